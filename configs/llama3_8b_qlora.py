"""QLoRA of Llama-3-8B-Instruct on one GPU of 24 GB: NF4 base, rank 16 on every linear, layers recomputed.

Requires data.path. On four such devices add --config.mesh.data=4.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """One pass over the data, 16 rows per step."""
    config = default_config()
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.model.dtype = "bfloat16"
    config.model.quant = "nf4"
    config.lora.r = 16
    config.lora.lora_alpha = 32.0
    config.lora.lora_dropout = 0.05
    config.optim.learning_rate = 2e-4
    config.optim.warmup_steps = 20
    config.train.epochs = 1.0
    config.train.batch_size = 4
    config.train.grad_accum = 4
    config.train.seq_len = 2048
    return config
