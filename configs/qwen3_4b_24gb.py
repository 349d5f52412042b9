"""LoRA of Qwen3-4B on one GPU of 24 GB: base in bfloat16, rank 16 on every linear, nothing recomputed.

Requires data.path. For rows of 8192 tokens add --config.train.seq_len=8192 --config.train.remat=full.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """One pass over the data, 24,576 tokens a step."""
    config = default_config()
    config.model.path = "Qwen/Qwen3-4B-Instruct-2507"
    config.model.dtype = "bfloat16"
    config.lora.r = 16
    config.lora.lora_alpha = 32.0
    config.optim.learning_rate = 2e-4
    config.optim.warmup_ratio = 0.03
    config.train.epochs = 1.0
    # As much as leaves room in the 75 % of a card's memory that JAX takes; longer rows need layers recomputed.
    config.train.batch_size = 1
    config.train.grad_accum = 8
    config.train.seq_len = 3072
    config.train.remat = "none"
    return config
