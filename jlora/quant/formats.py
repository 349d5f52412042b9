"""The table of packed formats: a new one is a file with its `PackedArray` and `pack`, and a row here."""

import functools
from collections.abc import Callable

from jaxtyping import Array, Float

from jlora.errors import UserError
from jlora.quant import four_bit, int8, mxfp4
from jlora.quant.packed import PackedArray

# Format → its pack(array, *, double_quant).
FORMATS: dict[str, Callable[..., PackedArray]] = {
    **{name: functools.partial(four_bit.pack, format=name) for name in four_bit.CODEBOOKS},
    "int8": int8.pack,
    "mxfp4": mxfp4.pack,
}


def quantize(array: Float[Array, "..."], format: str = "nf4", *, double_quant: bool = True) -> PackedArray:
    """The packed form of a kernel [..., D, N]; each leading index is quantised as a tensor of its own.

    Args:
        format: "nf4" or "fp4" (bitsandbytes' 4 bits), "int4" (4 bits, a uniform grid), "int8" (LLM.int8's rows) or
            "mxfp4" (4 bits, scales that are powers of two).
        double_quant: keep block scales in 8 bits (4.13 bits a weight), not float32 (4.5 bits); int8 has no blocks, and
            MXFP4's scales always have 8 bits (4.25 bits a weight).

    Raises:
        ValueError: the format is unknown, or the array has fewer than two dimensions.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown; expected one of {', '.join(FORMATS)}")
    if array.ndim < 2:
        raise UserError(f"only arrays [..., D, N] can be packed; found shape {array.shape}")
    return FORMATS[format](array, double_quant=double_quant)
