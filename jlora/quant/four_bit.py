"""NF4: 4-bit NormalFloat arrays (QLoRA, Dettmers et al. 2023) with bitsandbytes' values to the bit, as a pytree.

Invariants of an `NF4Array` of logical shape [..., D, N] (a kernel maps D inputs to N outputs; leading axes are stacked
layers):
  - blocks are 64 consecutive inputs of one output, which is bitsandbytes' order (it flattens the [N, D] transpose);
  - codes, absmax and the logical array have the same rank and axis order, so sharding D or N of a kernel shards its
  parts;
  - two neighbours on D share a byte, the first in the high nibble.
When D is not a multiple of 64, bitsandbytes' blocks straddle outputs; then the flattened transpose is kept as one
column.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK = 64
NESTED_BLOCK = 256

CODEBOOK = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_absmax", "offset"],
    meta_fields=["matrix", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class NF4Array:
    """A packed array; see the module's invariants.

    The parts may also be ShapeDtypeStructs or shardings, whatever JAX puts in an array's place.

    Attributes:
        codes: uint8 [..., D/2, N], two 4-bit codes a byte.
        absmax: block scales [..., D/64, N]: float32, or uint8 codes of the 8-bit dynamic map when nested.
        nested_absmax: float32 [..., ceil(D·N/64/256)], one scale for 256 block scales in bitsandbytes' order; None if
        not nested. offset: float32 [...], the mean subtracted from the block scales before they were quantised; None
        if not nested. matrix: (D, N), the logical last two dimensions.
        dtype: the dtype that dequantised values are rounded to.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    offset: Any
    matrix: tuple[int, int]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], *self.matrix)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


# Whatever `quantize` returns.
PackedArray = NF4Array


def is_packed(leaf: Any) -> bool:
    """Whether the leaf is a packed value rather than an array."""
    return isinstance(leaf, PackedArray)


def quantize(array: Float[Array, "..."], format: str = "nf4", *, double_quant: bool = True) -> NF4Array:
    """The packed form of a kernel [..., D, N]; each leading index is quantised as a tensor of its own.

    Equal to `bitsandbytes.functional.quantize_4bit(kernel.T, quant_type="nf4", compress_statistics=double_quant)` on a
    CPU. The one thing that may differ is the last bit of `offset`, a float32 mean that torch sums in an order of its
    own.

    Raises:
        ValueError: an unknown format, or an array of fewer than two dimensions.
    """
    if format != "nf4":
        raise ValueError(f"format {format!r} is unknown; expected 'nf4'")
    if array.ndim < 2:
        raise ValueError(f"only arrays [..., D, N] can be packed; found shape {array.shape}")
    return _quantize(array, double_quant)


@functools.partial(jax.jit, static_argnames=("dtype",))
def dequantize(leaf: NF4Array, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
    """The array [..., D, N] that a packed value stands for: codebook · scale in float32, rounded once to the leaf's
    dtype.

    Args:
        dtype: of the result, when it is to differ from the leaf's.
    """
    values = _lookup(_unpack(leaf.codes)) * jnp.repeat(block_scales(leaf), BLOCK, axis=-2)
    return _from_blocks(values, leaf.matrix).astype(leaf.dtype).astype(dtype or leaf.dtype)


def block_scales(leaf: NF4Array) -> Float[Array, "*stack blocks N"]:
    """The float32 scale of every block, recovered from its 8-bit form when nested."""
    if leaf.nested_absmax is None:
        return leaf.absmax
    blocks, outputs = leaf.absmax.shape[-2:]
    order = jnp.arange(outputs)[None, :] * blocks + jnp.arange(blocks)[:, None]
    nested = jnp.take(leaf.nested_absmax, order // NESTED_BLOCK, axis=-1)
    product = jnp.asarray(dynamic_map())[leaf.absmax] * nested
    # bitsandbytes rounds the product before it adds. XLA would fuse both into one rounding; a maximum in between, which
    # changes no value, is what its CPU backend keeps (it drops barriers and reduce_precision).
    return jnp.maximum(product, jnp.finfo(jnp.float32).min) + leaf.offset[..., None, None]


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of the signed 8-bit dynamic data type (Dettmers et al. 2021), float32, ascending."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(0.1, 1.0, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * means
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.asarray(values, np.float32))


@functools.cache
def _dynamic_thresholds() -> np.ndarray:
    """For each code but the first, the least float32 in [-1, 1] that bitsandbytes' CPU quantiser gives that code or a
    higher one.

    It rounds a value to one of 65,536 levels and takes the code nearest to the level, so small codes have coarse
    borders.
    """
    codes = dynamic_map()
    levels = np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)
    first_level = np.searchsorted((codes[:-1] + codes[1:]) * np.float32(0.5), levels).searchsorted(np.arange(1, 256))

    def level(values: np.ndarray) -> np.ndarray:
        half = (values + np.float32(1)) * np.float32(0.5)
        return (
            (half.astype(np.float64) * 65535 + 0.5).astype(np.float32).astype(np.int64)
        )  # one rounding: a fused multiply-add

    def as_float(order: np.ndarray) -> np.ndarray:  # float32s as integers in the same order
        return np.where(order < 0, np.int64(-(2**31)) - order, order).astype(np.int32).view(np.float32)

    one = np.int64(np.float32(1).view(np.int32))
    below, reached = np.full(255, -one - 1), np.full(255, one)
    while np.any(reached - below > 1):
        middle = (below + reached) // 2
        enough = level(as_float(middle)) >= first_level
        below, reached = np.where(enough, below, middle), np.where(enough, middle, reached)
    return as_float(reached)


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """float32 linspace as torch computes it: counted from both ends, each product and sum rounded once."""
    start, stop = np.float32(start), np.float32(stop)
    step = np.float64((stop - start) / np.float32(count - 1))
    index = np.arange(count)
    return np.where(index < count // 2, start + step * index, stop - step * (count - 1 - index)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("double_quant",))
def _quantize(array: jax.Array, double_quant: bool) -> NF4Array:
    matrix, dtype = (array.shape[-2], array.shape[-1]), np.dtype(array.dtype)
    columns = _to_blocks(array.astype(jnp.float32))
    blocks = columns.reshape(*columns.shape[:-2], -1, BLOCK, columns.shape[-1])
    absmax = jnp.max(jnp.abs(blocks), axis=-2)
    scaled = _scale(blocks, absmax[..., None, :], partial=(matrix[0] * matrix[1]) % BLOCK != 0)
    # how many midpoints lie strictly below: a tie goes to the lower code
    index = sum((scaled > midpoint).astype(jnp.uint8) for midpoint in (CODEBOOK[:-1] + CODEBOOK[1:]) / np.float32(2))
    index = index.reshape(columns.shape)
    codes = (index[..., 0::2, :] << 4) | index[..., 1::2, :]
    nested, offset = None, None
    if double_quant:
        absmax, nested, offset = _quantize_scales(absmax)
    return NF4Array(codes, absmax, nested, offset, matrix, dtype)


def _quantize_scales(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """8-bit codes, nested scales and offset of block scales [..., blocks, N]; nested blocks run in bitsandbytes' flat
    order.
    """
    flat = jnp.swapaxes(absmax, -1, -2).reshape(*absmax.shape[:-2], -1)
    offset = _mean(flat)
    count = flat.shape[-1]
    centred = jnp.pad(flat - offset[..., None], [(0, 0)] * (flat.ndim - 1) + [(0, -count % NESTED_BLOCK)])
    blocks = centred.reshape(*flat.shape[:-1], -1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = _scale(blocks[..., None], nested[..., None, None], partial=False)
    codes = jnp.searchsorted(jnp.asarray(_dynamic_thresholds()), scaled, side="right")
    codes = jnp.where(nested[..., None, None] == 0, 0, codes)  # all equal to the offset: bitsandbytes writes code 0
    codes = codes.astype(jnp.uint8).reshape(*flat.shape[:-1], -1)[..., :count]
    stacked = codes.reshape(*absmax.shape[:-2], absmax.shape[-1], absmax.shape[-2])
    return jnp.swapaxes(stacked, -1, -2), nested, offset


def _mean(flat: jax.Array) -> jax.Array:
    """The float32 mean over the last axis, summed in pairs so that its error does not grow with the number of
    blocks.
    """
    count = flat.shape[-1]
    total = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, (1 << (count - 1).bit_length()) - count)])
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0] / count


def _scale(blocks: jax.Array, absmax: jax.Array, *, partial: bool) -> jax.Array:
    """Blocks [..., n, 64, N] over their absmax, in [-1, 1]: by the reciprocal, but a partial last block by division."""
    safe = jnp.where(absmax == 0, 1.0, absmax)
    scaled = blocks * (1.0 / safe)
    if partial:
        scaled = scaled.at[..., -1:, :, :].set(blocks[..., -1:, :, :] / safe[..., -1:, :, :])
    return jnp.clip(scaled, -1.0, 1.0)


def _to_blocks(array: jax.Array) -> jax.Array:
    """[..., D', N'] whose columns hold whole blocks: the array itself, or its flattened transpose as one padded
    column.
    """
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


def _unpack(codes: jax.Array) -> jax.Array:
    """uint8 codes [..., D, N] from bytes [..., D/2, N].

    Each byte is repeated and then shifted by 4 or 0: XLA vectorises that, where it would branch on stacked halves.
    """
    *stack, half, outputs = codes.shape
    twice = jnp.broadcast_to(codes[..., :, None, :], (*stack, half, 2, outputs))
    shift = 4 - 4 * jax.lax.broadcasted_iota(jnp.uint8, twice.shape, twice.ndim - 2)
    return ((twice >> shift) & 15).reshape(*stack, 2 * half, outputs)


def _lookup(index: jax.Array) -> jax.Array:
    """Codebook values of 4-bit indices by a tree of four selects, which vectorises where a gather from a table does
    not.
    """

    def choose(bit: int, values: np.ndarray) -> jax.Array:
        if len(values) == 1:
            return jnp.float32(values[0])
        high, low = choose(bit - 1, values[len(values) // 2 :]), choose(bit - 1, values[: len(values) // 2])
        return jnp.where((index >> bit) & 1 == 1, high, low)

    return choose(3, CODEBOOK)
