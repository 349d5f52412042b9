"""The quickstart: QLoRA of SmolLM2-135M-Instruct on function calling.

Requires model.path, data.path. scripts/quickstart.sh gives them.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """A few minutes on two CPU cores: less than half a pass over the questions (train.steps=174 is a whole pass)."""
    config = default_config()
    config.model.quant = "nf4"
    config.lora.r = 16
    config.lora.lora_alpha = 32.0
    config.lora.target_modules = "all-linear"
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "linear"
    config.train.epochs = 1.0
    config.train.steps = 72
    config.train.batch_size = 4
    config.train.seq_len = 512
    # Questions are about half a row long: rows of one question each, grouped by length, have as little padding as
    # packed rows, and need less attention.
    config.data.packing = False
    config.data.bucket = 128
    config.train.remat = False  # the activations of this small model always fit, and recomputing them takes time
    return config
