"""The quickstart: QLoRA of SmolLM2-135M-Instruct on function calling.

scripts/quickstart.sh gives model.path and data.path.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """One pass over the questions."""
    config = default_config()
    config.model.quant = "nf4"
    config.lora.r = 16
    config.lora.lora_alpha = 32.0
    config.lora.target_modules = "all-linear"
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "linear"
    config.train.epochs = 1.0
    config.train.batch_size = 4
    config.train.seq_len = 512
    return config
