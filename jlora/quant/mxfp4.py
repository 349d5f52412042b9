"""Packed 4-bit arrays with a power of two as the scale of every 32 values: MXFP4 of the OCP Microscaling formats 1.0.

gpt-oss is published in it. Invariants of a `PackedMxfp4` of logical shape [..., D, N] (D inputs, N outputs):
  - blocks are 32 consecutive inputs of one output; if D is not a multiple, the last block is padded with zeros;
  - two neighbours on D share a byte, the first in the low nibble: gpt-oss's bytes, with the axes in jlora's order;
  - codes, scales and the logical array have the same rank and axis order, so sharding D or N shards all of them.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jlora.kernels.order import after
from jlora.quant.four_bit import nibbles
from jlora.quant.lookups import lookup
from jlora.quant.packed import PackedArray, splits_neighbours
from jlora.quant.scales import rounded_to

BLOCK = 32
# E2M1: one sign bit, two of exponent, one of mantissa.
_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([_POSITIVE, -_POSITIVE])
BIAS = 127  # E8M0: a scale's code is its exponent plus this
EXPONENT = 2  # of the largest E2M1 value, 6 = 1.5 · 2²
# The largest code of a scale by which every value is finite in float32; 255 stands for NaN.
LARGEST = 252

_SHIFTS = np.array([0, 4], np.uint8)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["matrix", "dtype"])
@dataclasses.dataclass(frozen=True)
class PackedMxfp4(PackedArray):
    """A packed array; see the module's invariants.

    Attributes:
        codes: uint8 [..., 16 · blocks, N], two E2M1 values a byte.
        scales: uint8 [..., blocks, N], the blocks' scales in E8M0: 2^(code - 127).
        matrix: (D, N), the logical last two dimensions.
        dtype: the dtype that dequantised values are rounded to; bfloat16 and float32 hold them exactly.
    """

    codes: Any
    scales: Any
    matrix: tuple[int, int]
    dtype: np.dtype
    format: ClassVar[str] = "mxfp4"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], *self.matrix)

    def dense(self, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
        return unpack(self, dtype)

    def strided(self, dtype: jax.typing.DTypeLike | None = None) -> tuple[Float[Array, "*stack d N"], ...]:
        if self.matrix[0] % 2 or not splits_neighbours():
            return super().strided(dtype)
        return unpack_halves(self, dtype)


@functools.partial(jax.jit, static_argnames=("double_quant",))
def pack(array: Float[Array, "*stack D N"], *, double_quant: bool) -> PackedMxfp4:
    """The packed form of kernels, by the specification's conversion.

    A block's scale is the power of two of its largest magnitude, divided by that of the largest E2M1 value; what then
    is above 6 becomes 6, and all else is rounded to the nearest value, ties to even. What was packed with another rule
    for the scales keeps its values, since every value of a block can be written with this scale too.

    Args:
        double_quant: has no effect, as the scales have 8 bits.
    """
    matrix, dtype = (array.shape[-2], array.shape[-1]), np.dtype(array.dtype)
    padded = jnp.pad(array.astype(jnp.float32), [(0, 0)] * (array.ndim - 2) + [(0, -matrix[0] % BLOCK), (0, 0)])
    blocks = padded.reshape(*padded.shape[:-2], -1, BLOCK, matrix[1])
    exponents = _biased_exponent(jnp.max(jnp.abs(blocks), axis=-2))
    scales = jnp.clip(exponents - EXPONENT, 0, LARGEST)
    codes = _nearest(blocks * _power(2 * BIAS - scales)[..., None, :]).reshape(padded.shape)
    return PackedMxfp4(codes[..., 0::2, :] | codes[..., 1::2, :] << 4, scales.astype(jnp.uint8), matrix, dtype)


@functools.partial(jax.jit, static_argnames=("dtype",))
def unpack(leaf: PackedMxfp4, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
    """The kernels that a packed value stands for: E2M1 value · 2^(scale - 127).

    Below float32's least normal number, 2^-126, the device may flush scales and values to zero.
    """
    leaf, shifts = after(leaf, jnp.asarray(_SHIFTS))
    values = lookup(nibbles(leaf.codes, shifts), VALUES) * jnp.repeat(_power(leaf.scales), BLOCK, axis=-2)
    return rounded_to(values[..., : leaf.matrix[0], :], leaf.dtype, dtype)


@functools.partial(jax.jit, static_argnames=("dtype",))
def unpack_halves(leaf: PackedMxfp4, dtype: jax.typing.DTypeLike | None = None) -> tuple[jax.Array, jax.Array]:
    """The rows 0, 2, 4 … and 1, 3, 5 … of `unpack`, for an even number of inputs."""
    scales = jnp.repeat(_power(leaf.scales), BLOCK // 2, axis=-2)
    first, second = (
        rounded_to(
            (lookup((leaf.codes >> shift) & 15, VALUES) * scales)[..., : leaf.matrix[0] // 2, :], leaf.dtype, dtype
        )
        for shift in _SHIFTS.tolist()
    )
    return first, second


def _biased_exponent(values: Float[Array, "..."]) -> Int[Array, "..."]:
    """floor(log2 of positive float32 values) + 127, exactly; 0 for those that are not normal."""
    return jax.lax.bitcast_convert_type(values, jnp.int32) >> 23


def _power(biased: jax.Array) -> Float[Array, "..."]:
    """2^(biased - 127) for 0 to 254."""
    biased = biased.astype(jnp.int32)
    bits = jnp.where(biased == 0, 1 << 22, biased << 23)  # 2^-127 is not a normal number
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _nearest(values: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """The codes of the nearest E2M1 values; of two that are as near, the one with an even mantissa."""
    magnitude = jnp.abs(values)
    borders = (_POSITIVE[1:] + _POSITIVE[:-1]) / 2
    index = jnp.zeros(values.shape, jnp.uint8)
    for code, border in enumerate(borders):
        passed = magnitude >= border if code % 2 else magnitude > border
        index = index + passed.astype(jnp.uint8)
    return index | (jnp.signbit(values).astype(jnp.uint8) << 3)
