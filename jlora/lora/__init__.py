"""LoRA as a transformation of a param tree: adapters sit beside base leaves; one half is frozen, the other trained."""

from jlora.lora.bank import Bank, choose
from jlora.lora.binding import bind, from_nnx
from jlora.lora.config import LoraConfig
from jlora.lora.extraction import extract
from jlora.lora.full import FullConfig
from jlora.lora.kinds.copies import resolve
from jlora.lora.kinds.dora import base_norms
from jlora.lora.linears import embed, grouped_linear, linear, unembed, update
from jlora.lora.low_rank import Fit, Fits
from jlora.lora.merging import merge, merged_leaf, untie
from jlora.lora.mixing import mix
from jlora.lora.partition import (
    adapter_leaves,
    combine,
    drops,
    is_adapter,
    is_trainable,
    labels,
    overlay,
    scaled,
    split,
    strip,
    with_starts,
)
from jlora.lora.retention import Kept, kept
from jlora.lora.setup import init
from jlora.lora.stacking import stack, unstack
from jlora.lora.starts import kernel_gradients

__all__ = [
    "Bank",
    "Fit",
    "Fits",
    "FullConfig",
    "Kept",
    "LoraConfig",
    "adapter_leaves",
    "base_norms",
    "bind",
    "choose",
    "combine",
    "drops",
    "embed",
    "extract",
    "from_nnx",
    "grouped_linear",
    "init",
    "is_adapter",
    "is_trainable",
    "kept",
    "kernel_gradients",
    "labels",
    "linear",
    "merge",
    "merged_leaf",
    "mix",
    "overlay",
    "resolve",
    "scaled",
    "split",
    "stack",
    "strip",
    "unembed",
    "unstack",
    "untie",
    "update",
    "with_starts",
]
