"""LoRA of Llama-3-8B-Instruct in bfloat16 over a TPU v5e-8 slice: weights, gradients' inputs and rows split by FSDP.

Requires data.path. On several hosts, start scripts/train.py --distributed on each of them.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """One pass over the data, 16 rows per step."""
    config = default_config()
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.model.dtype = "bfloat16"
    config.lora.r = 16
    config.lora.lora_alpha = 32.0
    config.optim.learning_rate = 2e-4
    config.optim.warmup_steps = 20
    config.train.epochs = 1.0
    config.train.batch_size = 16  # in one go: every micro-batch gathers all weights again
    config.train.seq_len = 2048
    config.mesh.fsdp = -1
    return config
