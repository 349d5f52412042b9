"""Rotary position embeddings (RoFormer, Su et al. 2021), of a head's two halves or of neighbouring values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.models.config import Rope

# The rope_types whose frequencies depend on the document's length.
LENGTH_DEPENDENT = ("dynamic", "longrope")


def rope_tables(
    rope: Rope, positions: Int[Array, "B T"], lengths: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """(cos, sin) of every position's angles, float32: each angle twice, in the places of the values that it rotates.

    Args:
        lengths: the length of each token's document; needed by the types in LENGTH_DEPENDENT.
    """
    if rope.rope_type == "dynamic":
        frequencies = _dynamic(rope, lengths)
    elif rope.rope_type == "longrope":
        short, long = (jnp.asarray(_frequencies(rope, factors)) for factors in (rope.short_factor, rope.long_factor))
        is_long = lengths[..., None] > rope.original_max_position_embeddings
        frequencies = jnp.where(is_long, long[None, None], short[None, None])
    else:
        frequencies = jnp.asarray(inverse_frequencies(rope))[None, None]
    angles = positions[..., None].astype(jnp.float32) * (-frequencies if rope.clockwise else frequencies)
    angles = jnp.repeat(angles, 2, axis=-1) if rope.interleaved else jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def inverse_frequencies(rope: Rope) -> np.ndarray:
    """The float32 [dim/2] angular frequencies, scaled as in transformers' `modeling_rope_utils`.

    For rope_types that do not depend on the length.
    """
    frequencies = _frequencies(rope)
    if rope.rope_type == "proportional":
        return frequencies * (np.arange(rope.dim // 2) < int(rope.partial_rotary_factor * rope.dim // 2)) / rope.factor
    if rope.rope_type == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.rope_type == "llama3":
        return _llama3(frequencies, rope)
    if rope.rope_type == "yarn":
        return _yarn(frequencies, rope)
    return frequencies


def _frequencies(rope: Rope, factors: tuple[float, ...] = (1.0,)) -> np.ndarray:
    exponents = np.arange(0, rope.dim, 2, dtype=np.int64).astype(np.float32) / np.float32(rope.dim)
    return np.float32(1) / (np.asarray(factors, np.float32) * np.float32(rope.rope_theta) ** exponents)


def _llama3(frequencies: np.ndarray, rope: Rope) -> np.ndarray:
    """Llama 3.1: divides frequencies of long wavelengths by `factor`, keeps short ones, and interpolates between."""
    length = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    low, high = length / rope.low_freq_factor, length / rope.high_freq_factor
    smooth = (length / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    slowed = np.where(wavelengths > low, frequencies / rope.factor, frequencies)
    return np.where((wavelengths <= low) & (wavelengths >= high), between, slowed).astype(np.float32)


def _yarn(frequencies: np.ndarray, rope: Rope) -> np.ndarray:
    """YaRN's frequencies (Peng et al. 2023), by their turns in the original length.

    Those with fewer than beta_slow turns are divided by `factor`, those with more than beta_fast are kept, with a
    linear ramp in between.
    """

    def dimension(turns: float) -> float:
        length = rope.original_max_position_embeddings
        return rope.dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 if low == high else 0
    slowed = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    return (frequencies / np.float32(rope.factor) * slowed + frequencies * (1 - slowed)).astype(np.float32)


def _dynamic(rope: Rope, lengths: jax.Array) -> jax.Array:
    """NTK-aware scaling [B, T, dim/2]: past max_position_embeddings the base grows with the length."""
    longest = jnp.float32(rope.max_position_embeddings)
    stretch = rope.factor * jnp.maximum(lengths.astype(jnp.float32), longest) / longest - (rope.factor - 1)
    base = rope.rope_theta * stretch ** (rope.dim / (rope.dim - 2))
    exponents = jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / rope.dim
    return 1 / base[..., None] ** exponents[None, None]


def rotate(
    x: Float[Array, "B T heads F"],
    cos: Float[Array, "B T dim"],
    sin: Float[Array, "B T dim"],
    interleaved: bool = False,
) -> Float[Array, "B T heads F"]:
    """x with the first `dim` values of every head rotated by its position's angles, in x's dtype.

    As transformers' `apply_rotary_pos_emb`.

    Args:
        interleaved: whether neighbouring values are rotated together, rather than those of the two halves.
    """
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:  # without a reshape to pairs, whose last axis of two would fill a tile by itself
        is_first = jax.lax.broadcasted_iota(jnp.int32, turned.shape, 3) % 2 == 0
        crossed = jnp.where(is_first, -jnp.roll(turned, -1, axis=-1), jnp.roll(turned, 1, axis=-1))
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        crossed = jnp.concatenate([-second, first], axis=-1)
    turned = turned * cos[:, :, None, :].astype(x.dtype) + crossed * sin[:, :, None, :].astype(x.dtype)
    return jnp.concatenate([turned, kept], axis=-1) if kept.shape[-1] else turned
