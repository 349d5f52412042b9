"""LoRA of SmolLM2-135M-Instruct, unquantised: a recipe that a laptop can run.

Requires data.path.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """Two passes over the data."""
    config = default_config()
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.lora.r = 16
    config.lora.lora_alpha = 32.0
    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 10
    config.train.epochs = 2.0
    config.train.batch_size = 8
    config.train.seq_len = 1024
    return config
