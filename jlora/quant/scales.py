"""Block scales in 8 bits ("double quantisation", QLoRA, Dettmers et al. 2023), equal to bitsandbytes' to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jlora.quant.lookups import lookup

NESTED_BLOCK = 256


def quantize_scales(
    absmax: Float[Array, "*stack blocks N"],
) -> tuple[UInt8[Array, "*stack blocks N"], Float[Array, "*stack nested"], Float[Array, "*stack"]]:
    """(8-bit codes, nested scales, offset) of block scales; nested blocks are in bitsandbytes' flat order."""
    flat = jnp.swapaxes(absmax, -1, -2).reshape(*absmax.shape[:-2], -1)
    offset = _mean(flat)
    count = flat.shape[-1]
    centred = jnp.pad(flat - offset[..., None], [(0, 0)] * (flat.ndim - 1) + [(0, -count % NESTED_BLOCK)])
    blocks = centred.reshape(*flat.shape[:-1], -1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = jnp.clip(blocks * (1.0 / jnp.where(nested == 0, 1.0, nested))[..., None], -1.0, 1.0)
    codes = jnp.searchsorted(jnp.asarray(_dynamic_thresholds()), scaled, side="right")
    codes = jnp.where(nested[..., None] == 0, 0, codes)  # all equal to the offset: bitsandbytes writes code 0
    codes = codes.astype(jnp.uint8).reshape(*flat.shape[:-1], -1)[..., :count]
    stacked = codes.reshape(*absmax.shape[:-2], absmax.shape[-1], absmax.shape[-2])
    return jnp.swapaxes(stacked, -1, -2), nested, offset


def dequantize_scales(
    codes: UInt8[Array, "*stack blocks N"], nested_absmax: Float[Array, "*stack nested"], offset: Float[Array, "*stack"]
) -> Float[Array, "*stack blocks N"]:
    """The float32 block scales that `quantize_scales` packed."""
    *stack, blocks, outputs = codes.shape
    nested = jnp.repeat(nested_absmax, NESTED_BLOCK, axis=-1)[..., : blocks * outputs]
    product = lookup(codes, dynamic_map()) * jnp.swapaxes(nested.reshape(*stack, outputs, blocks), -1, -2)
    # bitsandbytes rounds the product before it adds. XLA would fuse both and round once; its CPU backend drops barriers
    # and reduce_precision in between, but keeps a maximum, which changes no value.
    return jnp.maximum(product, jnp.finfo(jnp.float32).min) + offset[..., None, None]


def rounded_to(
    values: Float[Array, "..."], stored: jax.typing.DTypeLike, dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "..."]:
    """The values rounded to `stored` and held in `dtype` (None: in `stored`).

    Two casts would not do: XLA may drop a narrowing whose result is widened again, and does so on GPUs.
    """
    stored = jnp.dtype(stored)
    if dtype is None or jnp.dtype(dtype) == stored:
        return values.astype(stored)
    if stored == jnp.bfloat16:
        return jax.lax.reduce_precision(values.astype(jnp.float32), exponent_bits=8, mantissa_bits=7).astype(dtype)
    if stored == jnp.float16:  # reduce_precision(5, 10) would flush subnormals; the maximum changes no value
        return jnp.maximum(values.astype(jnp.float16), jnp.finfo(jnp.float16).min).astype(dtype)
    return values.astype(stored).astype(dtype)


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The 256 values of the 8-bit dynamic data type (Dettmers et al. 2021), float32, ascending.

    Args:
        signed: from -1 to 1; otherwise from 0 to 1, with fractions twice as fine.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(0.1, 1.0, 2 ** (exponent if signed else exponent + 1) + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * means
        values += [*scaled.tolist(), *((-scaled).tolist() if signed else [])]
    return np.sort(np.asarray(values, np.float32))


@functools.cache
def _dynamic_thresholds() -> np.ndarray:
    """For each code but the first, the least float32 that bitsandbytes maps to it or to a higher one.

    The values are in [-1, 1], the quantiser is that for CPUs.

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
    """float32 linspace as torch computes it: from both ends, each product and sum rounded once."""
    start, stop = np.float32(start), np.float32(stop)
    step = np.float64((stop - start) / np.float32(count - 1))
    index = np.arange(count)
    return np.where(index < count // 2, start + step * index, stop - step * (count - 1 - index)).astype(np.float32)


def _mean(flat: jax.Array) -> jax.Array:
    """The float32 mean over the last axis, by pairwise summation so that its error does not grow with the length."""
    count = flat.shape[-1]
    total = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, (1 << (count - 1).bit_length()) - count)])
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0] / count
