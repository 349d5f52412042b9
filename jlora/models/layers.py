"""The Flax modules that every family is built from. A module computes with whatever leaves are at its path."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora import lora, sharding
from jlora.types import Params

ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_fast": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
}


class Linear(nn.Module):
    """x @ kernel (+ bias) by `jlora.lora.linear`, which handles packed kernels and adapters at this path."""

    features: int
    use_bias: bool = False
    gathered: bool = False  # by the caller, who gathers once for several calls

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing():
            self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
            if self.use_bias:
                self.param("bias", nn.initializers.zeros, (self.features,))
        self.sow("inputs", "x", x)  # kept only where a caller asks for this collection
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        inputs, outputs = sharding.features("/".join(self.path))
        # An input that every device has whole is not held here: several linears may share it, and only the sum of
        # their gradients should be held, once.
        x = x if inputs is None else sharding.held(x, inputs)
        return sharding.held(lora.linear(x, leaves(self) if self.gathered else used(self), key=key), outputs)


class Embed(nn.Module):
    """Rows of `embedding` [V, D] by `jlora.lora.embed`."""

    vocabulary: int
    features: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        if self.is_initializing():
            self.param("embedding", nn.initializers.normal(0.02), (self.vocabulary, self.features))
        return sharding.held(lora.embed(tokens, leaves(self)))


class Norm(nn.Module):
    """A norm over the last axis, with float32 statistics, rounded where transformers rounds.

    "rms", "rms_wide", "rms_plus_one": x / rms(x) · scale (Zhang and Sennrich 2019). "rms" scales after rounding to x's
    dtype, the others before; "rms_plus_one" scales by 1 + scale. "layer": (x - mean) / deviation · scale + bias (Ba et
    al. 2016); "layer_unbiased": without the bias. "rms_bare": x / rms(x), without leaves. Each of the `groups` equal
    parts of x has statistics of its own.
    """

    kind: str
    epsilon: float
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing() and self.kind != "rms_bare":
            start = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
            self.param("scale", start, (x.shape[-1],))
            if self.kind == "layer":
                self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32).reshape(self._grouped(x.shape))
        if self.kind.startswith("layer"):
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        normal = normal.reshape(x.shape)
        if self.kind == "rms_bare":
            return normal.astype(x.dtype)
        weights = lora.resolve(leaves(self))
        scale = weights["scale"].reshape((1,) * (x.ndim - 1) + (-1,))
        if self.kind == "rms":
            return scale.astype(x.dtype) * normal.astype(x.dtype)
        y = normal * (scale.astype(jnp.float32) + (1 if self.kind == "rms_plus_one" else 0))
        if self.kind == "layer":
            y = y + weights["bias"].astype(jnp.float32).reshape(scale.shape)
        return y.astype(x.dtype)

    def _grouped(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.groups == 1 else (*shape[:-1], self.groups, shape[-1] // self.groups)


class XIELU(nn.Module):
    """An activation with learned slopes (Huang and Schlag 2024), computed in float32.

    p · x² + beta · x where x is positive, and (exp(min(x, eps)) - 1 - x) · (beta + n) + beta · x elsewhere; p and n are
    the softplus of `alpha_p` and `alpha_n`.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # As they start in transformers; beta and eps are not trained there, but files have them too.
        starts = {"alpha_p": math.log(math.expm1(0.8)), "alpha_n": math.log(math.expm1(0.3)), "beta": 0.5, "eps": -1e-6}
        shapes = {"alpha_p": (1,), "alpha_n": (1,)}
        numbers = {
            name: Parameter(shapes.get(name, ()), start, name=name)().reshape((1,) * x.ndim)
            for name, start in starts.items()
        }
        wide, beta = x.astype(jnp.float32), numbers["beta"]
        above = nn.softplus(numbers["alpha_p"]) * wide * wide
        below = (jnp.expm1(jnp.minimum(wide, numbers["eps"])) - wide) * (beta + nn.softplus(numbers["alpha_n"]))
        return (jnp.where(wide > 0, above, below) + beta * wide).astype(x.dtype)


class Parameter(nn.Module):
    """Learned numbers that belong to no linear and no norm, float32."""

    shape: tuple[int, ...]
    start: float = 1.0

    @nn.compact
    def __call__(self) -> jax.Array:
        if self.is_initializing():
            self.param("value", nn.initializers.constant(self.start), self.shape)
        return lora.resolve(leaves(self))["value"].astype(jnp.float32)


# Those with parameters of their own.
LEARNED = {"xielu": XIELU}


class Filter(nn.Module):
    """(the taps [W, D], the bias [D] or None) of a convolution of each channel by itself.

    The leaf is not called `kernel`, so that it is neither adapted nor packed: it has only W numbers a channel, each of
    which counts for every token.
    """

    width: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array | None]:
        if self.is_initializing():
            self.param("filter", nn.initializers.lecun_normal(in_axis=0), (self.width, 1, channels))
            if self.use_bias:
                self.param("bias", nn.initializers.zeros, (channels,))
        weights = lora.resolve(leaves(self))
        return weights["filter"][:, 0], weights.get("bias")


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a factor that is part of the architecture."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def leaves(module: nn.Module) -> Params:
    """The leaves at a bound module's path, adapters included."""
    return module.variables["params"]


def used(module: nn.Module) -> Params:
    """`leaves` of a linear, gathered on every device that computes with them (see `jlora.sharding.gathered`)."""
    return sharding.gathered("/".join(module.path), leaves(module))
