"""Gated delta nets: projections, a convolution, norms and gates around `jlora.kernels.recurrence`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.families.family import Layer
from jlora.kernels.attention import AUTO
from jlora.kernels.recurrence import convolve, recur
from jlora.models.cache import Cache, Room, Shape
from jlora.models.config import ModelConfig
from jlora.models.context import Context
from jlora.models.layers import ACTIVATIONS, Filter, Linear, Norm, Parameter

UNIT_EPS = 1e-6  # of the norms of queries and keys


def room(config: ModelConfig, layer: Layer) -> Room:
    """What a layer keeps of earlier tokens: the last ones before the convolution, and the state of every head."""
    sizes = config.delta
    return {
        "tail": Shape((sizes.conv_kernel - 1, sizes.channels)),
        "state": Shape((sizes.value_heads, sizes.key_dim, sizes.value_dim), "float32"),
    }


def products(config: ModelConfig, layer: Layer, tokens: int) -> int:
    """Products for a token besides those with weights: two readings of the state and one writing."""
    return 3 * config.delta.state


class DeltaNet(nn.Module):
    """A gated delta net; with a cache, it continues from the state there.

    A head's decay at a token is exp(-exp(A_log) · softplus(a + dt_bias)), its rate sigmoid(b), where a and b are the
    head's outputs of linears. What it reads is normed and then scaled by silu(z).
    """

    config: ModelConfig
    layer: Layer = Layer()
    form: str = AUTO  # of attention, which is not used here

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        config, sizes, place = self.config, self.config.delta, (self.config.cache_stack(self.layer), context.slot)
        mixed, gates, rates, decays = self._project(x)
        before = {} if cache is None else cache.state(*place)
        kernel, _ = Filter(sizes.conv_kernel, name="conv1d")(mixed.shape[-1])
        mixed, tail = convolve(mixed, kernel, context.runs, tail=before.get("tail"))
        queries, keys, values = self._heads(ACTIVATIONS[config.hidden_act](mixed))
        decays = -jnp.exp(self._parameter("A_log")) * nn.softplus(
            decays.astype(jnp.float32) + self._parameter("dt_bias")
        )
        rates = nn.sigmoid(rates).astype(jnp.float32)
        if self.is_initializing():  # the recurrence itself has no weights, and takes long to trace
            y, state = values, None
        else:
            y, state = recur(queries, keys, values, decays, rates, context.runs, before.get("state"))
        if cache is not None:
            cache = cache.with_state(*place, {"tail": tail, "state": state})
        y = Norm("rms", config.norm_eps, name="norm")(y).astype(jnp.float32)
        y = (y * nn.silu(gates.reshape(y.shape).astype(jnp.float32))).astype(x.dtype)
        (output,) = config.names.mixer_outputs
        return Linear(config.hidden_size, name=output)(y.reshape(*x.shape[:2], -1)), cache

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, T, channels], gates [B, T, H·V], rates and decays before their functions."""
        sizes = self.config.delta
        wide, heads = sizes.value_heads * sizes.value_dim, sizes.value_heads
        if not sizes.fused:
            widths = {"in_proj_qkv": sizes.channels, "in_proj_z": wide, "in_proj_b": heads, "in_proj_a": heads}
            return tuple(Linear(width, name=name)(x) for name, width in widths.items())
        fused = Linear(sizes.channels + wide, name="in_proj_qkvz")(x)
        keys, values = sizes.key_dim, wide // sizes.key_heads
        *parts, gates = self._by_key_head(fused, [keys, keys, values, values])
        rates, decays = self._by_key_head(Linear(2 * heads, name="in_proj_ba")(x), [heads // sizes.key_heads] * 2)
        return jnp.concatenate(parts, axis=-1), gates, rates, decays

    def _by_key_head(self, fused: jax.Array, widths: list[int]) -> list[jax.Array]:
        """The parts, of these widths in each key head, of all heads."""
        by_head = fused.reshape(*fused.shape[:2], self.config.delta.key_heads, -1)
        edges = [sum(widths[:i]) for i in range(1, len(widths))]
        return [part.reshape(*fused.shape[:2], -1) for part in jnp.split(by_head, edges, axis=-1)]

    def _heads(self, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys of length 1 (queries then divided by the root of their width), and values, head by head."""
        sizes = self.config.delta
        keys = sizes.key_heads * sizes.key_dim
        parts = jnp.split(mixed, [keys, 2 * keys], axis=-1)
        heads = (sizes.key_heads, sizes.key_heads, sizes.value_heads)
        queries, keys, values = (
            part.reshape(*part.shape[:2], count, -1) for part, count in zip(parts, heads, strict=True)
        )
        return _unit(queries, sizes.key_dim**-0.5), _unit(keys), values

    def _parameter(self, name: str) -> jax.Array:
        return Parameter((self.config.delta.value_heads,), name=name)()[None, None]


def _unit(x: jax.Array, scale: float = 1.0) -> jax.Array:
    """x of this length along the last axis."""
    wide = x.astype(jnp.float32)
    return (wide * (scale * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + UNIT_EPS))).astype(x.dtype)
