"""One pair of functions for every packed format: `quantize` packs an array, `dequantize` unpacks it."""

from typing import Any

import jax
from jaxtyping import Array, Float

from jlora.errors import UserError
from jlora.quant import four_bit, int8
from jlora.quant.four_bit import Packed4bit
from jlora.quant.int8 import PackedInt8
from jlora.quant.rounded import Rounded

FORMATS = (*four_bit.CODEBOOKS, "int8")

PackedArray = Packed4bit | PackedInt8 | Rounded


def is_packed(leaf: Any) -> bool:
    """Whether the leaf is a packed value rather than an array."""
    return isinstance(leaf, PackedArray)


def quantize(array: Float[Array, "..."], format: str = "nf4", *, double_quant: bool = True) -> PackedArray:
    """The packed form of a kernel [..., D, N]; each leading index is quantised as a tensor of its own.

    Args:
        format: "nf4" or "fp4" (bitsandbytes' 4 bits), "int4" (4 bits, a uniform grid) or "int8" (LLM.int8's rows).
        double_quant: keep block scales in 8 bits (4.13 bits a weight), not float32 (4.5 bits); int8 has no blocks.

    Raises:
        ValueError: the format is unknown, or the array has fewer than two dimensions.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown; expected one of {', '.join(FORMATS)}")
    if array.ndim < 2:
        raise UserError(f"only arrays [..., D, N] can be packed; found shape {array.shape}")
    if format == "int8":
        return int8.pack(array)
    return four_bit.pack(array, format, double_quant=double_quant)


def dequantize(leaf: PackedArray, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
    """The array [..., D, N] that a packed value stands for, computed in float32 and rounded to the leaf's dtype.

    Args:
        dtype: the dtype that holds the rounded values, if not the leaf's.
    """
    if isinstance(leaf, Rounded):
        leaf = leaf.packed()
    return int8.unpack(leaf, dtype) if isinstance(leaf, PackedInt8) else four_bit.unpack(leaf, dtype)


def unpacked(leaf: Any) -> Any:
    """The array that updates are added to: a packed value dequantised, a `Rounded`'s own array, or an array itself."""
    if isinstance(leaf, Rounded):
        return leaf.array
    return dequantize(leaf) if is_packed(leaf) else leaf
