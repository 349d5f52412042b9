"""The Llama family: pre-norm blocks of grouped-query attention with RoPE and a gated MLP (Touvron et al. 2023)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.attention import Cache, attend
from jlora.models.config import ModelConfig
from jlora.models.layers import Linear, RMSNorm
from jlora.models.rope import rotate


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    Attributes:
        cos, sin: RoPE tables [B, T, F].
        mask: bool [B, T, S].
    """

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array


class Attention(nn.Module):
    """Self-attention; with a cache it writes the T new keys and values of `layer` and attends to all S."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        config, (batch, tokens, _) = self.config, x.shape

        def project(name: str, heads: int) -> jax.Array:
            y = Linear(heads * config.head_dim, config.attention_bias, name=name)(x)
            return y.reshape(batch, tokens, heads, config.head_dim)

        queries = rotate(project("q_proj", config.num_attention_heads), context.cos, context.sin)
        keys = rotate(project("k_proj", config.num_key_value_heads), context.cos, context.sin)
        values = project("v_proj", config.num_key_value_heads)
        if cache is not None:
            cache, keys, values = _remember(cache, layer, keys, values)
        y = attend(queries, keys, values, context.mask).reshape(batch, tokens, -1)
        return Linear(config.hidden_size, config.attention_bias, name="o_proj")(y), cache


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        gate = Linear(config.intermediate_size, config.mlp_bias, name="gate_proj")(x)
        up = Linear(config.intermediate_size, config.mlp_bias, name="up_proj")(x)
        return Linear(config.hidden_size, config.mlp_bias, name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One decoder layer."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        epsilon = self.config.rms_norm_eps
        attention = Attention(self.config, name="self_attn")
        y, cache = attention(RMSNorm(epsilon, name="input_layernorm")(x), context, cache, layer)
        x = x + y
        y = MLP(self.config, name="mlp")(RMSNorm(epsilon, name="post_attention_layernorm")(x))
        return x + y, cache


def _remember(cache: Cache, layer: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[Cache, jax.Array, jax.Array]:
    """The cache with a layer's new keys and values written at `length`, and all of that layer's keys and values."""

    def write(stack: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.swapaxes(new, 1, 2)[None].astype(stack.dtype)
        return jax.lax.dynamic_update_slice(stack, new, (layer, 0, 0, cache.length, 0))

    def read(stack: jax.Array) -> jax.Array:
        return jnp.swapaxes(jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), 1, 2)

    cache = dataclasses.replace(cache, keys=write(cache.keys, keys), values=write(cache.values, values))
    return cache, read(cache.keys), read(cache.values)
