"""Latent attention (MLA, DeepSeek-AI 2024): the keys and values of all heads are made from a few numbers of each token.

Only those numbers are kept in a cache. A single new token is compared with them as they are: the projection to keys
moves to the query, and that to values behind the sum over tokens. With many new tokens it is cheaper to make the keys
and values.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora import lora, sharding
from jlora.families.family import Latent, Layer
from jlora.kernels.attention import AUTO, TOKENS_SPLIT, attend
from jlora.lora.kinds import changed_leaves
from jlora.lora.kinds.banked import is_chosen
from jlora.models.attention import growth
from jlora.models.cache import Cache, Room, Shape
from jlora.models.config import ModelConfig
from jlora.models.context import Context
from jlora.models.layers import Linear, Norm, leaves, used
from jlora.models.rope import rotate

# The mesh axes of what goes to a cache [B, T, 1, F], of which every device has all tokens.
CACHED = (sharding.ROWS, None, None, None)
# transformers gives the norms of latents its default, whatever config.json says.
NORM_EPS = 1e-6


def room(config: ModelConfig, layer: Layer) -> Room:
    """What a layer keeps of earlier tokens: what their keys and values are made from, and the keys' rotated part."""
    sizes = _sizes(config)
    return {"latent": Shape((1, None, sizes.kv_lora_rank)), "rotated": Shape((1, None, sizes.qk_rope_head_dim))}


def products(config: ModelConfig, layer: Layer, tokens: int) -> int:
    """As for attention, where keys and values are made for every head."""
    sizes = _sizes(config)
    return config.num_attention_heads * (sizes.qk_head_dim + sizes.v_head_dim) * min(tokens, layer.window or tokens)


class LatentAttention(nn.Module):
    """Self-attention whose keys and values are `kv_b_proj` of a latent, and of one rotated key that all heads share."""

    config: ModelConfig
    layer: Layer = Layer()
    form: str = AUTO

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        config, sizes, (batch, tokens, _) = self.config, _sizes(self.config), x.shape
        heads = config.num_attention_heads
        rotation = context.cos, context.sin, config.interleaved
        plain, turned = jnp.split(self._queries(x), [sizes.qk_nope_head_dim], axis=-1)
        queries = jnp.concatenate([plain, rotate(turned, *rotation)], axis=-1)
        if config.query_growth:
            queries = queries * growth(config.query_growth, context.marks.positions).astype(queries.dtype)
        latent, turned = self._latents(x)
        rotated = rotate(turned, *rotation)
        if cache is not None:
            new = {"latent": sharding.constrain(latent, *CACHED), "rotated": sharding.constrain(rotated, *CACHED)}
            cache, found = cache.extend(config.cache_stack(self.layer), context.slot, new)
            latent, rotated = found["latent"], found["rotated"]
        expand = Expansion(config, name="kv_b_proj")
        if cache is not None and tokens == 1 and expand.can_be_absorbed():
            y = self._absorbed(queries, latent, rotated, expand, context)
        else:
            y = self._expanded(queries, latent, rotated, expand, context)
        y = y.reshape(batch, tokens, heads * sizes.v_head_dim)
        return Linear(config.hidden_size, config.output_bias, name=config.names.output)(y), cache

    def _queries(self, x: jax.Array) -> jax.Array:
        config, sizes = self.config, _sizes(self.config)
        width = config.num_attention_heads * sizes.qk_head_dim
        if sizes.q_lora_rank is None:
            y = Linear(width, name="q_proj")(x)
        else:
            low = Linear(sizes.q_lora_rank, config.qkv_bias, name="q_a_proj")(x)
            y = Linear(width, name="q_b_proj")(Norm(config.norm, NORM_EPS, name="q_a_layernorm")(low))
        return sharding.constrain(y.reshape(*x.shape[:2], -1, sizes.qk_head_dim), *TOKENS_SPLIT)

    def _latents(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The latent, normalised, and the key that is to be rotated, [B, T, 1, …]."""
        config, sizes = self.config, _sizes(self.config)
        joined = Linear(sizes.kv_lora_rank + sizes.qk_rope_head_dim, config.qkv_bias, name="kv_a_proj_with_mqa")(x)
        latent, turned = jnp.split(joined, [sizes.kv_lora_rank], axis=-1)
        latent = Norm(config.norm, NORM_EPS, name="kv_a_layernorm")(latent)
        return latent[:, :, None], turned[:, :, None]

    def _expanded(
        self, queries: jax.Array, latent: jax.Array, rotated: jax.Array, expand: "Expansion", context: Context
    ) -> jax.Array:
        """[B, T, H, V] with the keys and values of all tokens."""
        config, sizes = self.config, _sizes(self.config)
        made = expand(latent[:, :, 0]).reshape(*latent.shape[:2], config.num_attention_heads, -1)
        plain, values = jnp.split(made, [sizes.qk_nope_head_dim], axis=-1)
        shared = jnp.broadcast_to(rotated, (*plain.shape[:-1], rotated.shape[-1]))
        keys = jnp.concatenate([plain, shared.astype(plain.dtype)], axis=-1)
        if self.is_initializing():  # attention itself has no weights, and takes long to trace
            return values
        return _attend_padded(queries, keys, values, context, config, self.form)

    def _absorbed(
        self, queries: jax.Array, latent: jax.Array, rotated: jax.Array, expand: "Expansion", context: Context
    ) -> jax.Array:
        """The same, with the latent as the one key and value that all heads share."""
        config, sizes = self.config, _sizes(self.config)
        kernel = expand.kernel().astype(queries.dtype)
        kernel = kernel.reshape(sizes.kv_lora_rank, config.num_attention_heads, -1)
        to_keys, to_values = jnp.split(kernel, [sizes.qk_nope_head_dim], axis=-1)
        plain, turned = jnp.split(queries, [sizes.qk_nope_head_dim], axis=-1)
        queries = jnp.concatenate([jnp.einsum("bthf,rhf->bthr", plain, to_keys), turned], axis=-1)
        keys = jnp.concatenate([latent, rotated], axis=-1)
        y = _attend_padded(queries, keys, latent, context, config, self.form)
        return jnp.einsum("bthr,rhv->bthv", y, to_values)


class Expansion(nn.Module):
    """The linear from latents to the plain part of all heads' keys and to their values."""

    config: ModelConfig

    def setup(self) -> None:
        sizes = _sizes(self.config)
        width = self.config.num_attention_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        self.linear = Linear(width)
        nn.share_scope(self, self.linear)

    def __call__(self, latent: jax.Array) -> jax.Array:
        return self.linear(latent)

    def can_be_absorbed(self) -> bool:
        """Whether it is one matrix, which it is not if each row has an adapter of its own, or an adapter has a bias."""
        own = leaves(self)
        return not is_chosen(own) and changed_leaves(own) <= {"kernel"}

    def kernel(self) -> jax.Array:
        """Its matrix, with its adapter."""
        return lora.merged_leaf(lora.resolve(used(self)), "kernel")


def _attend_padded(
    queries: jax.Array, keys: jax.Array, values: jax.Array, context: Context, config: ModelConfig, form: str
) -> jax.Array:
    """`attend` for values of another width than keys: the kernels have one, so zeros are added to the narrower."""
    narrow, width = values.shape[-1], max(keys.shape[-1], values.shape[-1])
    parts = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in (queries, keys, values))
    return attend(*parts, context.marks, config.attention_scale, config.attention_softcap, form)[..., :narrow]


def _sizes(config: ModelConfig) -> Latent:
    assert config.latent is not None, "a family with latent attention gives its sizes"
    return config.latent
