"""Mamba-2 mixers (Dao and Gu 2024): projections, a convolution, a gated norm around `jlora.kernels.recurrence`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora.families.family import Layer
from jlora.kernels.attention import AUTO
from jlora.kernels.recurrence import convolve, recur
from jlora.models.cache import Cache, Room, Shape
from jlora.models.config import ModelConfig
from jlora.models.context import Context
from jlora.models.layers import ACTIVATIONS, Filter, Linear, Norm, Parameter, scaled


def room(config: ModelConfig, layer: Layer) -> Room:
    """What a layer keeps of earlier tokens: the last ones before the convolution, and the state of every head."""
    sizes = config.mamba
    return {
        "tail": Shape((sizes.conv_kernel - 1, sizes.channels)),
        "state": Shape((sizes.heads, sizes.state_size, sizes.head_dim), "float32"),
    }


def products(config: ModelConfig, layer: Layer, tokens: int) -> int:
    """Products for a token besides those with weights: one writing of the state and one reading."""
    sizes = config.mamba
    return 2 * sizes.heads * sizes.state_size * sizes.head_dim


class Mamba(nn.Module):
    """A Mamba-2 mixer; with a cache, it continues from the state there.

    A head's step at a token is softplus(dt + dt_bias), within limits, and its decay exp(-exp(A_log) · step). What it
    reads, plus D times its input, is scaled by silu of the gate, and may be normed.
    """

    config: ModelConfig
    layer: Layer = Layer()
    form: str = AUTO  # of attention, which is not used here

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        config, sizes, place = self.config, self.config.mamba, (self.config.cache_stack(self.layer), context.slot)
        gates, mixed, steps = jnp.split(self._project(x), [sizes.inner, sizes.inner + sizes.channels], axis=-1)
        before = {} if cache is None else cache.state(*place)
        kernel, offset = Filter(sizes.conv_kernel, sizes.conv_bias, name="conv1d")(sizes.channels)
        mixed, tail = convolve(mixed, kernel, context.runs, offset, before.get("tail"))
        inputs, keys, queries = self._heads(ACTIVATIONS[sizes.activation](mixed))
        steps = nn.softplus(steps.astype(jnp.float32) + self._parameter("dt_bias"))
        steps = jnp.clip(steps, *sizes.step_limits)
        decays, skip = -jnp.exp(self._parameter("A_log")) * steps, self._parameter("D")[..., None]
        wide = inputs.astype(jnp.float32)
        if self.is_initializing():  # the recurrence itself has no weights, and takes long to trace
            y, state = inputs, None
        else:
            values = (wide * steps[..., None]).astype(x.dtype)
            y, state = recur(queries, keys, values, decays, None, context.runs, before.get("state"))
        if cache is not None:
            cache = cache.with_state(*place, {"tail": tail, "state": state})
        y = self._gated((y.astype(jnp.float32) + skip * wide).reshape(gates.shape), gates).astype(x.dtype)
        (output,) = config.names.mixer_outputs
        return scaled(Linear(config.hidden_size, sizes.output_bias, name=output)(y), config.scales.mamba_out), cache

    def _project(self, x: jax.Array) -> jax.Array:
        """Gates, inputs, keys, queries and steps [B, T, …], in this order, before the convolution."""
        sizes, scales = self.config.mamba, self.config.scales
        shared = sizes.groups * sizes.state_size
        widths = (sizes.inner, sizes.inner, shared, shared, sizes.heads)
        y = Linear(sum(widths), sizes.bias, name="in_proj")(scaled(x, scales.mamba_in))
        if set(scales.projected) == {1}:
            return y
        return y * jnp.asarray(np.repeat(scales.projected, widths), y.dtype)[None, None]

    def _heads(self, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Inputs [B, T, H, F], keys and queries [B, T, G, N] (Mamba's x, B and C)."""
        sizes = self.config.mamba
        parts = jnp.split(mixed, [sizes.inner, sizes.inner + sizes.groups * sizes.state_size], axis=-1)
        heads = (sizes.heads, sizes.groups, sizes.groups)
        return tuple(part.reshape(*part.shape[:2], count, -1) for part, count in zip(parts, heads, strict=True))

    def _gated(self, y: jax.Array, gates: jax.Array) -> jax.Array:
        """y · silu(gates), normed before or after that, group by group, or not at all."""
        sizes, gates = self.config.mamba, nn.silu(gates.astype(jnp.float32))
        if sizes.norm is None:
            return y * gates
        norm = Norm("rms", self.config.norm_eps, sizes.groups, name="norm")
        return norm(y * gates) if sizes.norm == "gated" else norm(y) * gates

    def _parameter(self, name: str) -> jax.Array:
        return Parameter((self.config.mamba.heads,), name=name)()[None, None]
