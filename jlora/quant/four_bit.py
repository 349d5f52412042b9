"""Packed 4-bit arrays as a pytree: 16-value codebooks and a scale for every block of 64, nested or not.

NF4 (QLoRA, Dettmers et al. 2023) and FP4 equal bitsandbytes' to the bit; int4 is a uniform grid in the same blocks.

Invariants of a `Packed4bit` of logical shape [..., D, N] (a kernel maps D inputs to N outputs; leading axes are stacked
layers):
  - blocks are 64 consecutive inputs of one output, which is bitsandbytes' order (it flattens the [N, D] transpose);
  - codes, absmax and the logical array have the same rank and axis order, so sharding D or N of a kernel shards its
    parts;
  - two neighbours on D share a byte, the first in the high nibble.
If D is not a multiple of 64, bitsandbytes' blocks straddle outputs; the flattened transpose is then kept as one column.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.kernels.order import after
from jlora.quant.lookups import lookup
from jlora.quant.packed import PackedArray, splits_neighbours
from jlora.quant.scales import dequantize_scales, quantize_scales, rounded_to

BLOCK = 64

_FP4_POSITIVE = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)

# Format → the value of each code, times the block's absmax.
CODEBOOKS: dict[str, np.ndarray] = {
    "nf4": np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
    # One sign bit, two of exponent, one of mantissa; the zero with the sign bit is +0 in bitsandbytes too.
    "fp4": np.concatenate([_FP4_POSITIVE, np.float32(0) - _FP4_POSITIVE]),
    # code/8 for the integers -8 … 7. Cutting a positive maximum to 7/8 costs less than the wider steps of code/7 for
    # -7 … 7 (8 % more error on normal weights). Sixteen levels without a zero, (2·code - 15)/15, have nearly as little
    # error but harm a model more (SmolLM2-135M's divergence by benchmarks/quantization.py: 0.80 instead of 0.39).
    "int4": np.arange(-8, 8, dtype=np.float32) / np.float32(8),
}


_SHIFTS = np.array([4, 0], np.uint8)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_absmax", "offset"],
    meta_fields=["format", "matrix", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Packed4bit(PackedArray):
    """A packed array; see the module's invariants.

    Attributes:
        codes: uint8 [..., D/2, N], two 4-bit codes a byte.
        absmax: block scales [..., D/64, N]: float32, or uint8 codes of the 8-bit dynamic map if nested.
        nested_absmax: float32 [..., ceil(D·N/64/256)], one scale for 256 block scales in bitsandbytes' order; None if
            not nested.
        offset: float32 [...], the mean subtracted from the block scales before they were quantised; None if not nested.
        format: a name of CODEBOOKS.
        matrix: (D, N), the logical last two dimensions.
        dtype: the dtype that dequantised values are rounded to.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    offset: Any
    format: str
    matrix: tuple[int, int]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], *self.matrix)

    def dense(self, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
        return unpack(self, dtype)

    def strided(self, dtype: jax.typing.DTypeLike | None = None) -> tuple[Float[Array, "*stack d N"], ...]:
        if self.matrix[0] % BLOCK or not splits_neighbours():
            return super().strided(dtype)
        return unpack_halves(self, dtype)

    def with_scales(self) -> "Packed4bit":
        return dataclasses.replace(self, absmax=block_scales(self), nested_absmax=None, offset=None)


@functools.partial(jax.jit, static_argnames=("format", "double_quant"))
def pack(array: Float[Array, "*stack D N"], format: str, *, double_quant: bool) -> Packed4bit:
    """The packed form of kernels, each leading index a tensor of its own.

    Equal to `bitsandbytes.functional.quantize_4bit(kernel.T, quant_type=format, compress_statistics=double_quant)` on a
    CPU. Only the last bit of `offset` may differ, a float32 mean that torch sums in another order.
    """
    matrix, dtype = (array.shape[-2], array.shape[-1]), np.dtype(array.dtype)
    columns = _to_blocks(array.astype(jnp.float32))
    blocks = columns.reshape(*columns.shape[:-2], -1, BLOCK, columns.shape[-1])
    absmax = jnp.max(jnp.abs(blocks), axis=-2)
    scaled = _scale(blocks, absmax[..., None, :], partial=(matrix[0] * matrix[1]) % BLOCK != 0)
    index = _nearest(scaled, CODEBOOKS[format]).reshape(columns.shape)
    codes = (index[..., 0::2, :] << 4) | index[..., 1::2, :]
    nested, offset = None, None
    if double_quant:
        absmax, nested, offset = quantize_scales(absmax)
    return Packed4bit(codes, absmax, nested, offset, format, matrix, dtype)


@functools.partial(jax.jit, static_argnames=("dtype",))
def unpack(leaf: Packed4bit, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
    """The kernels that a packed value stands for: codebook · scale in float32, rounded once to the leaf's dtype."""
    leaf, shifts = after(leaf, jnp.asarray(_SHIFTS))
    values = lookup(nibbles(leaf.codes, shifts), CODEBOOKS[leaf.format])
    values = values * jnp.repeat(block_scales(leaf), BLOCK, axis=-2)
    return rounded_to(_from_blocks(values, leaf.matrix), leaf.dtype, dtype)


@functools.partial(jax.jit, static_argnames=("dtype",))
def unpack_halves(leaf: Packed4bit, dtype: jax.typing.DTypeLike | None = None) -> tuple[jax.Array, jax.Array]:
    """The rows 0, 2, 4 … and 1, 3, 5 … of `unpack`, for inputs in whole blocks."""
    scales = jnp.repeat(block_scales(leaf), BLOCK // 2, axis=-2)
    first, second = (
        rounded_to(lookup((leaf.codes >> shift) & 15, CODEBOOKS[leaf.format]) * scales, leaf.dtype, dtype)
        for shift in _SHIFTS.tolist()
    )
    return first, second


def block_scales(leaf: Packed4bit) -> Float[Array, "*stack blocks N"]:
    """The float32 scale of every block, recovered from its 8-bit form when nested."""
    if leaf.nested_absmax is None:
        return leaf.absmax
    return dequantize_scales(leaf.absmax, leaf.nested_absmax, leaf.offset)


def from_flat(
    codes: np.ndarray,
    absmax: np.ndarray,
    nested_absmax: np.ndarray | None,
    offset: np.ndarray | None,
    *,
    format: str,
    matrix: tuple[int, int],
    dtype: np.dtype,
) -> Packed4bit:
    """The packed kernel [D, N] from parts in bitsandbytes' flat order; all are arrays on the host.

    Args:
        codes: uint8 [ceil(D·N/2)], along the flattened [N, D] transpose.
        absmax: [ceil(D·N/64)], in the same order.
    """
    inputs, outputs = matrix
    columns = outputs if inputs % BLOCK == 0 else 1
    zero = int(_nearest_host(np.float32(0), CODEBOOKS[format]))
    codes = np.pad(codes.ravel(), (0, absmax.size * BLOCK // 2 - codes.size), constant_values=zero << 4 | zero)
    codes, absmax = (np.ascontiguousarray(part.reshape(columns, -1).T) for part in (codes, absmax))
    return Packed4bit(codes, absmax, nested_absmax, offset, format, matrix, np.dtype(dtype))


def to_flat(leaf: Packed4bit) -> tuple[np.ndarray, np.ndarray]:
    """Codes and absmax of a packed kernel [D, N] in bitsandbytes' flat order: the inverse of `from_flat`."""
    codes, absmax = (np.ascontiguousarray(np.asarray(part).T).ravel() for part in (leaf.codes, leaf.absmax))
    return codes[: -(-leaf.size // 2)], absmax


def _nearest(scaled: jax.Array, codebook: np.ndarray) -> jax.Array:
    """The uint8 codes of the nearest values, by counting the midpoints strictly below: a tie goes to the lower value.

    Where two codes have equal values (FP4's zeros), negative numbers get the first and positive ones the second.
    """
    order = np.argsort(codebook, kind="stable").astype(np.uint8)
    ascending = codebook[order]
    rank = sum((scaled > middle).astype(jnp.uint8) for middle in (ascending[:-1] + ascending[1:]) / np.float32(2))
    return rank if np.array_equal(order, np.arange(16)) else lookup(rank, order)


def _nearest_host(value: np.float32, codebook: np.ndarray) -> np.uint8:
    order = np.argsort(codebook, kind="stable").astype(np.uint8)
    ascending = codebook[order]
    return order[np.sum(value > (ascending[:-1] + ascending[1:]) / np.float32(2))]


def _scale(blocks: jax.Array, absmax: jax.Array, *, partial: bool) -> jax.Array:
    """Blocks [..., n, 64, N] over their absmax, in [-1, 1]: times the reciprocal, but a partial last block divided."""
    safe = jnp.where(absmax == 0, 1.0, absmax)
    scaled = blocks * (1.0 / safe)
    if partial:
        scaled = scaled.at[..., -1:, :, :].set(blocks[..., -1:, :, :] / safe[..., -1:, :, :])
    return jnp.clip(scaled, -1.0, 1.0)


def _to_blocks(array: jax.Array) -> jax.Array:
    """[..., D', N'] with whole blocks in columns: the array itself, or its flattened transpose as a padded column."""
    *stack, inputs, outputs = array.shape
    if inputs % BLOCK == 0:
        return array
    flat = jnp.swapaxes(array, -1, -2).reshape(*stack, inputs * outputs, 1)
    return jnp.pad(flat, [(0, 0)] * len(stack) + [(0, -(inputs * outputs) % BLOCK), (0, 0)])


def _from_blocks(columns: jax.Array, matrix: tuple[int, int]) -> jax.Array:
    inputs, outputs = matrix
    if inputs % BLOCK == 0:
        return columns
    flat = columns[..., : inputs * outputs, 0]
    return jnp.swapaxes(flat.reshape(*flat.shape[:-1], outputs, inputs), -1, -2)


def nibbles(codes: jax.Array, shifts: jax.Array) -> jax.Array:
    """uint8 codes [..., D, N] from bytes [..., D/2, N].

    Each byte is repeated and then shifted by 4 or 0, which XLA vectorises; for stacked halves it would branch.

    Args:
        shifts: 4 and 0 (or 0 and 4, if the first is in the low nibble), from a barrier with a part of the packed value.
            Otherwise JAX would compute every code's shift once, before a loop over layers, and keep it.
    """
    *stack, half, outputs = codes.shape
    twice = jnp.broadcast_to(codes[..., :, None, :], (*stack, half, 2, outputs))
    shift = jnp.broadcast_to(shifts[:, None], twice.shape)
    return ((twice >> shift) & 15).reshape(*stack, 2 * half, outputs)
