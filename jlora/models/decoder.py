"""The decoder layer of every family: what differs between them is data in the ModelConfig."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora import sharding
from jlora.models.attention import Cache, attend
from jlora.models.config import ModelConfig
from jlora.models.experts import Mixture
from jlora.models.layers import ACTIVATIONS, Linear, Norm
from jlora.models.rope import rotate

# The mesh axes of queries [B, T, H, F], and of keys and values, which a device needs for all tokens. Where tensor does
# not divide the heads of the keys, every device has all of them.
QUERIES = (sharding.ROWS, sharding.TOKENS, "tensor", None)
KEYS = (sharding.ROWS, None, "tensor", None)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a layer shares with the others of one forward pass.

    Attributes:
        cos, sin: RoPE tables [B, T, F]; None where nothing is rotated.
        mask: bool [B, T, S].
    """

    cos: jax.Array | None
    sin: jax.Array | None
    mask: jax.Array


class Attention(nn.Module):
    """Self-attention; with a cache it writes the T new keys and values of `layer` and attends to all S."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        config, (batch, tokens, _) = self.config, x.shape
        queries, keys, values = self._project(x)
        if context.cos is not None:
            queries, keys = (rotate(heads, context.cos, context.sin) for heads in (queries, keys))
        if config.inverse_layer_scale:
            queries = queries / (layer + 1).astype(queries.dtype)
        if cache is not None:
            cache, keys, values = cache.write(layer, keys, values)
        y = attend(queries, keys, values, context.mask, config.attention_scale, config.attention_softcap)
        y = y.reshape(batch, tokens, -1)
        return Linear(config.hidden_size, config.output_bias, name=config.names.output)(y), cache

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, F], keys and values [B, T, K, F], normed where the family does."""
        config, names = self.config, self.config.names.queries_keys_values
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        widths = [count * config.head_dim for count in heads]
        if len(names) == 3:
            parts = [Linear(width, config.qkv_bias, name=name)(x) for name, width in zip(names, widths, strict=True)]
        else:
            parts = self._split(Linear(sum(widths), config.qkv_bias, name=names[0])(x), widths)
        if config.qk_norm == "all":
            parts = [self._norm("q_norm", parts[0]), self._norm("k_norm", parts[1]), parts[2]]
        queries, keys, values = (
            sharding.constrain(part.reshape(*x.shape[:2], count, config.head_dim), *axes)
            for part, count, axes in zip(parts, heads, (QUERIES, KEYS, KEYS), strict=True)
        )
        if config.qk_norm == "head":
            queries, keys = self._norm("q_norm", queries), self._norm("k_norm", keys)
        return queries, keys, values

    def _split(self, fused: jax.Array, widths: list[int]) -> list[jax.Array]:
        if not self.config.qkv_by_head:
            return jnp.split(fused, [widths[0], widths[0] + widths[1]], axis=-1)
        by_head = fused.reshape(*fused.shape[:-1], self.config.num_attention_heads, -1)
        return [part.reshape(*fused.shape[:-1], -1) for part in jnp.split(by_head, 3, axis=-1)]

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return Norm(self.config.norm, self.config.norm_eps, name=name)(x)


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)), gate and up apart or in one product, or down(act(up(x)))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, names = self.config, self.config.names
        width = config.intermediate_size * (2 if config.gated else 1) // len(names.mlp_up)
        parts = [Linear(width, config.mlp_bias, name=name)(x) for name in names.mlp_up]
        if config.gated and len(parts) == 1:
            parts = jnp.split(parts[0], 2, axis=-1)
        y = ACTIVATIONS[config.hidden_act](parts[0])
        y = y * parts[1] if config.gated else y
        return Linear(config.hidden_size, config.mlp_bias, name=names.mlp_down)(y)


class Block(nn.Module):
    """One decoder layer: norm, attention, norm, MLP, with norms before or after or both."""

    config: ModelConfig
    experts: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        config, names = self.config, self.config.names
        x = sharding.held(x)
        attention = Attention(config, name=names.attention)
        y, cache = attention(self._norm(names.attention_norms[0], x), context, cache, layer)
        attended = x + self._scaled(self._norm(names.attention_norms[1], y))
        mlp = Mixture(config, name="mlp") if self.experts else MLP(config, name="mlp")
        y = mlp(self._norm(names.mlp_norms[0], x if config.parallel else attended))
        return attended + self._scaled(self._norm(names.mlp_norms[1], y)), cache

    def _norm(self, name: str | None, x: jax.Array) -> jax.Array:
        return x if name is None else sharding.held(Norm(self.config.norm, self.config.norm_eps, name=name)(x))

    def _scaled(self, y: jax.Array) -> jax.Array:
        scale = self.config.residual_scale
        return y if scale == 1 else y * jnp.asarray(scale, y.dtype)
