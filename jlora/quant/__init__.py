"""Packed 4-bit arrays, their matmul, and the rules for which leaves are packed."""

from jlora.quant.config import QuantConfig, as_config, leaf_format
from jlora.quant.matmul import grouped_matmul, matmul
from jlora.quant.nf4 import NF4Array, dequantize, quantize

__all__ = ["NF4Array", "QuantConfig", "as_config", "dequantize", "grouped_matmul", "leaf_format", "matmul", "quantize"]
