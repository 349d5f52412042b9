"""LoRA of Qwen3-8B on one GPU of 80 GB: base in bfloat16, rank 32 on every linear, nothing recomputed.

Requires data.path. For rows of 32,768 tokens add --config.train.batch_size=1 --config.train.seq_len=32768
--config.train.remat=full.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """One pass over the data, 32,768 tokens a step."""
    config = default_config()
    config.model.path = "Qwen/Qwen3-8B"
    config.model.dtype = "bfloat16"
    config.lora.r = 32
    config.lora.lora_alpha = 64.0
    config.optim.learning_rate = 2e-4
    config.optim.warmup_ratio = 0.03
    config.train.epochs = 1.0
    config.train.batch_size = 2
    config.train.grad_accum = 4
    config.train.seq_len = 4096
    config.train.remat = "none"
    return config
