"""Self-attention: projections, norms and rotations around `jlora.kernels.attention`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora import lora, sharding
from jlora.families.family import Layer, QueryGrowth
from jlora.kernels.attention import AUTO, TOKENS_SPLIT, attend
from jlora.models.cache import Cache, Room, Shape
from jlora.models.config import ModelConfig
from jlora.models.context import Context
from jlora.models.layers import Linear, Norm, leaves
from jlora.models.rope import rotate

# The mesh axes of keys and values [B, T, K, F] that go to a cache, of which a device has all tokens. If `tensor` does
# not divide the key heads, every device has all of them.
CACHED = (sharding.ROWS, None, sharding.FEATURES, None)


def room(config: ModelConfig, layer: Layer) -> Room:
    """What a layer keeps of earlier tokens: their keys and values, in the order in which attention reads them."""
    heads = config.heads(layer)
    shape = Shape((heads.keys, None, heads.width))
    return {"keys": shape, "values": shape}


class Attention(nn.Module):
    """Self-attention; with a cache, it writes the layer's T new keys and values and attends to all S."""

    config: ModelConfig
    layer: Layer = Layer()
    form: str = AUTO

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        config, (batch, tokens, _) = self.config, x.shape
        queries, keys, values, gate = self._project(x, TOKENS_SPLIT if cache is None else CACHED)
        if context.cos is not None:
            rotation = context.cos, context.sin, config.interleaved
            queries, keys = (rotate(heads, *rotation) for heads in (queries, keys))
        if config.qk_norm == "rotated":
            queries, keys = self._norms(queries, keys)
        if config.inverse_layer_scale:
            queries = queries / (context.layer + 1).astype(queries.dtype)
        if config.query_growth:
            queries = queries * _growth(config.query_growth, context.marks.positions).astype(queries.dtype)
        if cache is not None:
            place = config.cache_stack(self.layer), context.slot
            cache, found = cache.extend(*place, {"keys": keys, "values": values})
            keys, values = found["keys"], found["values"]
        settings = config.attention_scale, config.attention_softcap, self.form
        y = attend(queries, keys, values, context.marks, *settings, self._sinks())
        y = y if gate is None else y * nn.sigmoid(gate)
        y = y.reshape(batch, tokens, -1)
        return Linear(config.hidden_size, config.output_bias, name=config.names.output)(y), cache

    def _sinks(self) -> jax.Array | None:
        """The heads' scores that take part in every softmax, if the family has them."""
        if not self.config.attention_sinks:
            return None
        if self.is_initializing():
            self.param("sinks", nn.initializers.normal(0.02), (self.config.num_attention_heads,))
        return lora.resolve(leaves(self))["sinks"]

    def _project(self, x: jax.Array, axes: tuple) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Queries [B, T, H, F], keys and values [B, T, K, F] on these mesh axes, normalised if the family does that.

        The last of the four is the gate of each head's output [B, T, H, F], or None.
        """
        config, names = self.config, self.config.names.queries_keys_values
        sizes = config.heads(self.layer)
        heads = (sizes.queries, sizes.keys, sizes.keys)
        widths = [count * sizes.width for count in heads]
        widths[0] *= 2 if config.attention_gate else 1
        if len(names) == 3:
            parts = [Linear(width, config.qkv_bias, name=name)(x) for name, width in zip(names, widths, strict=True)]
        else:
            parts = self._split(Linear(sum(widths), config.qkv_bias, name=names[0])(x), widths)
        if config.qk_norm == "all":
            parts = [*self._norms(*parts[:2]), parts[2]]
        queries, keys, values = (
            sharding.constrain(part.reshape(*x.shape[:2], count, -1), *axes)
            for part, count, axes in zip(parts, heads, (TOKENS_SPLIT, axes, axes), strict=True)
        )
        queries, gate = jnp.split(queries, 2, axis=-1) if config.attention_gate else (queries, None)
        if config.qk_norm == "head":
            queries, keys = self._norms(queries, keys)
        return queries, keys, values, gate

    def _split(self, fused: jax.Array, widths: list[int]) -> list[jax.Array]:
        if not self.config.qkv_by_head:
            return jnp.split(fused, [widths[0], widths[0] + widths[1]], axis=-1)
        by_head = fused.reshape(*fused.shape[:-1], self.config.num_attention_heads, -1)
        return [part.reshape(*fused.shape[:-1], -1) for part in jnp.split(by_head, 3, axis=-1)]

    def _norms(self, *parts: jax.Array) -> list[jax.Array]:
        """Queries and keys, normalised."""
        config, names = self.config, self.config.names.qk_norms
        return [Norm(config.norm, config.norm_eps, name=name)(part) for name, part in zip(names, parts, strict=True)]


def _growth(growth: QueryGrowth, positions: jax.Array) -> jax.Array:
    """The factor [B, T, 1, 1] of queries at these positions."""
    beyond = (positions // growth.length).astype(jnp.float32)
    return (1 + growth.beta * jnp.log1p(beyond))[:, :, None, None]
