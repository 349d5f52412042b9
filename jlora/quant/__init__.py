"""Packed 4- and 8-bit arrays, matrix products with them, and the rules for which leaves are packed."""

from jlora.quant.config import QuantConfig, as_config, leaf_format
from jlora.quant.formats import FORMATS, quantize
from jlora.quant.four_bit import Packed4bit
from jlora.quant.int8 import PackedInt8
from jlora.quant.mixed import bits_of, candidates, choose, weight_damage
from jlora.quant.mxfp4 import PackedMxfp4
from jlora.quant.packed import (
    PackedArray,
    dequantize,
    format_of,
    is_packed,
    packs_update,
    stored,
    unpacked,
    with_scales,
)
from jlora.quant.products import grouped_matmul, matmul
from jlora.quant.rounded import Rounded
from jlora.quant.summary import kept_in

__all__ = [
    "FORMATS",
    "Packed4bit",
    "PackedArray",
    "PackedInt8",
    "PackedMxfp4",
    "QuantConfig",
    "Rounded",
    "as_config",
    "bits_of",
    "candidates",
    "choose",
    "dequantize",
    "format_of",
    "grouped_matmul",
    "is_packed",
    "kept_in",
    "leaf_format",
    "matmul",
    "packs_update",
    "quantize",
    "stored",
    "unpacked",
    "weight_damage",
    "with_scales",
]
