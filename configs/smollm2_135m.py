"""LoRA of SmolLM2-135M-Instruct, unquantised: a recipe that a laptop can run, in 4 GB and without a GPU.

Requires data.path. scripts/quickstart.sh is the shortest way to a first result.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """Two passes over the data, 8,192 tokens a step."""
    config = default_config()
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.lora.r = 16
    config.lora.lora_alpha = 32.0
    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 10
    config.train.epochs = 2.0
    config.train.batch_size = 2
    config.train.grad_accum = 4
    config.train.seq_len = 1024
    config.train.remat = "none"  # of so few rows all activations fit, and recomputing them takes time
    return config
