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


# The collection of the keys and values that later layers share.
KEPT = "kept"


def room(config: ModelConfig, layer: Layer) -> Room:
    """What a layer keeps of earlier tokens: their keys and values, in the order in which attention reads them."""
    heads = config.heads(layer)
    shape = Shape((heads.keys, None, heads.width))
    return {"keys": shape, "values": shape}


def products(config: ModelConfig, layer: Layer, tokens: int) -> int:
    """Products for a token of a row besides those with weights: with all keys, masked ones too, and values."""
    heads = config.heads(layer)
    return 2 * heads.queries * heads.width * min(tokens, layer.window or tokens)


class Attention(nn.Module):
    """Self-attention; with a cache, it writes the layer's T new keys and values and attends to all S."""

    config: ModelConfig
    layer: Layer = Layer()
    form: str = AUTO

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        config, (batch, tokens, _) = self.config, x.shape
        queries, keys, values, gate = self._project(x, TOKENS_SPLIT if cache is None else CACHED)
        queries, keys = self._placed(0, queries, context), None if keys is None else self._placed(1, keys, context)
        if config.inverse_layer_scale:
            queries = queries / (context.layer + 1).astype(queries.dtype)
        if config.query_growth:
            queries = queries * growth(config.query_growth, context.marks.positions).astype(queries.dtype)
        if self.layer.shares:
            keys, values = context.shared[self.layer.shares]
        elif cache is not None:
            place = config.cache_stack(self.layer), context.slot
            cache, found = cache.extend(*place, {"keys": keys, "values": values})
            keys, values = found["keys"], found["values"]
        if self.layer.keeps:
            self.sow(KEPT, self.layer.keeps, (keys, values))
        settings = config.attention_scale, config.attention_softcap, self.form
        sinks = self._sinks()
        # Attention itself has no weights, and tracing it takes longer than all the rest.
        y = queries if self.is_initializing() else attend(queries, keys, values, context.marks, *settings, sinks)
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

    def _project(
        self, x: jax.Array, axes: tuple
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
        """Queries [B, T, H, F], keys and values [B, T, K, F] on these mesh axes, normalised if the family does that.

        Keys and values are None if the layer shares those of another. The last of the four is the gate of each head's
        output [B, T, H, F], or None.
        """
        config, sizes = self.config, self.config.heads(self.layer)

        def heads(part: jax.Array, count: int, axes: tuple) -> jax.Array:
            return sharding.constrain(part.reshape(*x.shape[:2], count, -1), *axes)

        widths = [count * sizes.width for count in (sizes.queries, sizes.keys, sizes.keys)]
        gate, own_gate = None, config.names.output_gate if config.attention_gate else None
        widths[0] *= 2 if config.attention_gate and own_gate is None else 1
        queries, *rest = self._linears(x, widths)
        if config.qk_norm == "all":
            queries, rest[0] = self._norm(0, queries), self._norm(1, rest[0])
        queries = heads(queries, sizes.queries, TOKENS_SPLIT)
        if own_gate:
            gate = heads(Linear(widths[0], name=own_gate)(x), sizes.queries, TOKENS_SPLIT)
        elif config.attention_gate:
            queries, gate = jnp.split(queries, 2, axis=-1)
        if self.layer.shares:
            return queries, None, None, gate
        keys, values = (heads(part, sizes.keys, axes) for part in rest)
        if config.value_norm:
            values = Norm("rms_bare", config.norm_eps)(values)
        return queries, keys, values, gate

    def _linears(self, x: jax.Array, widths: list[int]) -> list[jax.Array]:
        """The outputs of the linears for queries, keys and values, of these widths."""
        config, names = self.config, self.config.names.queries_keys_values
        if len(names) == 1:
            return self._split(Linear(sum(widths), config.qkv_bias, name=names[0])(x), widths)
        own = 1 if self.layer.shares else 2 if self.layer.keys_as_values else 3
        parts = [Linear(width, config.qkv_bias, name=name)(x) for name, width in zip(names[:own], widths, strict=False)]
        return [*parts, parts[1]] if self.layer.keys_as_values else parts

    def _split(self, fused: jax.Array, widths: list[int]) -> list[jax.Array]:
        if not self.config.qkv_by_head:
            return jnp.split(fused, [widths[0], widths[0] + widths[1]], axis=-1)
        by_head = fused.reshape(*fused.shape[:-1], self.config.num_attention_heads, -1)
        return [part.reshape(*fused.shape[:-1], -1) for part in jnp.split(by_head, 3, axis=-1)]

    def _placed(self, which: int, heads: jax.Array, context: Context) -> jax.Array:
        """Queries (0) or keys (1), rotated, and normed before or after that."""
        if self.config.qk_norm == "head":
            heads = self._norm(which, heads)
        if self.config.qk_norm == "bare":
            heads = Norm("rms_bare", self.config.norm_eps)(heads)
        if context.cos is not None:
            heads = rotate(heads, context.cos, context.sin, self.config.interleaved)
        return self._norm(which, heads) if self.config.qk_norm == "rotated" else heads

    def _norm(self, which: int, x: jax.Array) -> jax.Array:
        return Norm(self.config.norm, self.config.norm_eps, name=self.config.names.qk_norms[which])(x)


def growth(rule: QueryGrowth, positions: jax.Array) -> jax.Array:
    """The factor [B, T, 1, 1] of queries at these positions."""
    beyond = (positions // rule.length).astype(jnp.float32)
    return (1 + rule.beta * jnp.log1p(beyond))[:, :, None, None]
