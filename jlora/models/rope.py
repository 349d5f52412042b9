"""Rotary position embeddings in Hugging Face's half-split layout (RoFormer, Su et al. 2021)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.models.config import ModelConfig, RopeScaling


def rope_tables(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """(cos, sin) of every position's angles, float32, each half of F a repeat of the other."""
    frequencies = jnp.asarray(inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """The float32 [F/2] angular frequencies, scaled as transformers' `modeling_rope_utils` does for each rope_type."""
    exponents = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those in between interpolated."""
    length = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    low, high = length / scaling.low_freq_factor, length / scaling.high_freq_factor
    smooth = (length / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = np.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    return np.where((wavelengths <= low) & (wavelengths >= high), between, slowed).astype(np.float32)


def rotate(
    x: Float[Array, "B T heads F"], cos: Float[Array, "B T F"], sin: Float[Array, "B T F"]
) -> Float[Array, "B T heads F"]:
    """x with every head turned by its position's angles, in x's dtype (transformers' `apply_rotary_pos_emb`)."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos[:, :, None, :].astype(x.dtype) + turned * sin[:, :, None, :].astype(x.dtype)
