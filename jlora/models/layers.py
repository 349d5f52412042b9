"""The Flax modules every family is built from. A module computes with whatever leaves lie at its path."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.lora import linear
from jlora.types import Params


class Linear(nn.Module):
    """x @ kernel (+ bias) by `jlora.lora.linear`, whose business packed kernels and adapters at this path are."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing():
            self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
            if self.use_bias:
                self.param("bias", nn.initializers.zeros, (self.features,))
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return linear(x, leaves(self), key=key)


class Embed(nn.Module):
    """Rows of `embedding` [V, D]."""

    vocabulary: int
    features: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        if self.is_initializing():
            self.param("embedding", nn.initializers.normal(0.02), (self.vocabulary, self.features))
        return jnp.take(leaves(self)["embedding"], tokens, axis=0)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, the mean square in float32 (Zhang and Sennrich 2019), rounded as transformers does."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing():
            self.param("scale", nn.initializers.ones, (x.shape[-1],))
        scale = leaves(self)["scale"].astype(x.dtype)
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return scale.reshape((1,) * (x.ndim - 1) + (-1,)) * normal.astype(x.dtype)


def leaves(module: nn.Module) -> Params:
    """The leaves at a bound module's path, adapters included."""
    return module.variables["params"]
