"""Names that commands offer, apart from the tables whose keys they are.

The tables hold functions on arrays, so that importing them takes seconds; this file imports nothing, so that `--help`
need not wait. `tests/test_names.py` compares the two.
"""

from typing import Literal

# What is done with records that cannot be used.
OnError = Literal["raise", "skip"]
# How adapters of experts are written: as PEFT does, or each by itself.
ExpertLayout = Literal["stacked", "each"]

FLOATS = ("bfloat16", "float16", "float32")  # dtypes of weights
PACKED_FORMATS = ("nf4", "fp4", "int4", "int8", "mxfp4")  # jlora.quant.FORMATS
# Those that checkpoints hold: jlora.hub.checkpoints.methods.BY_FORMAT
WRITTEN_FORMATS = ("nf4", "fp4", "int8", "mxfp4")
GGUF_TYPES = (  # jlora.hub.GGUF_TYPES
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
MIXTURES = (  # jlora.lora.mixing.METHODS
    *("cat", "svd", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"),
    *("peft:cat", "peft:svd", "peft:linear", "peft:magnitude_prune", "peft:ties", "peft:dare_linear"),
    *("peft:dare_ties", "peft:magnitude_prune_svd", "peft:ties_svd", "peft:dare_linear_svd", "peft:dare_ties_svd"),
)
# What may differ between the adapters of one run: jlora.train.config.OWN.
OWN_SETTINGS = (
    *("data", "lora", "model.adapter", "optim.learning_rate", "optim.schedule", "optim.warmup_steps"),
    *("optim.warmup_ratio", "optim.min_lr_ratio", "optim.decay_ratio", "optim.weight_decay"),
    *("optim.loraplus_lr_ratio", "train.seed"),
)
COMPILERS = ("tpu", "cuda13")  # extras that bring a compiler: jlora.train.planning.topology.COMPILERS
