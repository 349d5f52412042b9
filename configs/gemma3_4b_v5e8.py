"""LoRA of Gemma 3 4B on a TPU v5e-8, as Kaggle lends it: a copy of the base in bfloat16 and two rows on each chip.

Requires data.path. configs/gemma3_4b_v5e8.ipynb is a notebook around it, from data to a file for llama.cpp.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """One pass over the data, 32,768 tokens a step."""
    config = default_config()
    config.model.path = "google/gemma-3-4b-it"
    config.model.dtype = "bfloat16"
    config.lora.r = 16
    config.lora.lora_alpha = 32.0
    config.optim.learning_rate = 2e-4
    config.optim.warmup_ratio = 0.03
    config.train.epochs = 1.0
    config.train.batch_size = 16
    config.train.seq_len = 2048
    config.train.save_every = 50
    # The base fits on each chip, so that only the adapter's gradients cross the links between them.
    config.mesh.data = -1
    return config
