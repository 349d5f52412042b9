"""Packed 4-bit arrays, their matmul, and the rules for which leaves are packed."""

from jlora.quant.config import QuantConfig, as_config, leaf_format
from jlora.quant.matmul import grouped_matmul, matmul
from jlora.quant.nf4 import NF4Array, PackedArray, dequantize, is_packed, quantize

__all__ = [
    "NF4Array",
    "PackedArray",
    "QuantConfig",
    "as_config",
    "dequantize",
    "grouped_matmul",
    "is_packed",
    "leaf_format",
    "matmul",
    "quantize",
]
