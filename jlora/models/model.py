"""A decoder as pure functions over its param tree: embed, scan over the stacked layers, norm, head."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora import tree
from jlora.lora import linear
from jlora.lora.linear import SAVED
from jlora.models.attention import Cache, attention_mask
from jlora.models.config import ModelConfig
from jlora.models.layers import Embed, Linear, RMSNorm
from jlora.models.llama import Context
from jlora.models.rope import rope_tables
from jlora.types import Params


@dataclasses.dataclass(frozen=True)
class Model:
    """An architecture without weights: every method takes the params. Hashable, so it can be static in jit."""

    config: ModelConfig
    block: type[nn.Module]

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits of every next token.

        Args:
            positions: default 0, 1, 2, …; within a segment they must rise with the index, or keys are missed
            segment_ids: tokens see only their own segment; default one segment. 0 is padding by convention.
        """
        hidden, _ = self.hidden(params, tokens, positions, segment_ids)
        return self.logits(params, hidden)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        cache: Cache | None = None,
        key: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The final norm's output, and the cache with these tokens in it when one is given.

        Args:
            key: turns on dropout.
            remat: recompute each layer in the backward pass, keeping only its input.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        context, cache = self._context(positions, segment_ids, cache)
        config = self.config
        x = Embed(config.vocab_size, config.hidden_size).apply({"params": params["embed_tokens"]}, tokens)
        x, cache = self._layers(params["layers"], x, context, cache, key, remat)
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + tokens.shape[1])
        return RMSNorm(config.rms_norm_eps).apply({"params": params["norm"]}, x), cache

    def head(self, params: Params) -> Params:
        """The leaves that `project` needs: the head's, or the embedding when the two are tied."""
        return params["embed_tokens"] if self.config.tie_word_embeddings else params["lm_head"]

    def project(self, head: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits from hidden states."""
        if "embedding" in head:
            embedding = head["embedding"].astype(hidden.dtype)
            return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
        return linear(hidden, head).astype(jnp.float32)

    def logits(self, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits from hidden states."""
        return self.project(self.head(params), hidden)

    def empty_cache(self, params: Params, batch: int, size: int) -> Cache:
        """A cache for `batch` rows of up to `size` tokens, in the dtype of the activations."""
        config, dtype = self.config, params["embed_tokens"]["embedding"].dtype
        return Cache.empty(config.num_hidden_layers, batch, size, config.num_key_value_heads, config.head_dim, dtype)

    def abstract_params(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
        """The base tree as ShapeDtypeStructs: what a checkpoint of this architecture must hold."""
        return jax.eval_shape(lambda: self.random_params(jax.random.key(0), dtype))

    def random_params(self, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
        """Random params of this architecture, for tests and dry runs."""
        config = self.config
        tokens, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, config.hidden_size))
        context, _ = self._context(tokens, tokens, None)
        keys = jax.random.split(key, config.num_hidden_layers + 3)

        def layer(key: jax.Array) -> Params:
            return self.block(config).init(key, x, context, None, jnp.int32(0))["params"]

        params = {
            "embed_tokens": Embed(config.vocab_size, config.hidden_size).init(keys[0], tokens)["params"],
            "layers": jax.vmap(layer)(keys[3:]),
            "norm": RMSNorm(config.rms_norm_eps).init(keys[1], x)["params"],
        }
        if not config.tie_word_embeddings:
            params["lm_head"] = Linear(config.vocab_size).init(keys[2], x)["params"]
        return tree.map_with_path(lambda _, leaf: leaf.astype(dtype), params)

    def _context(
        self, positions: jax.Array, segment_ids: jax.Array, cache: Cache | None
    ) -> tuple[Context, Cache | None]:
        cos, sin = rope_tables(self.config, positions)
        if cache is None:
            return Context(cos, sin, attention_mask(positions, segment_ids, positions, segment_ids)), None
        cache = cache.mark(positions, segment_ids)
        return Context(cos, sin, attention_mask(positions, segment_ids, cache.positions, cache.segment_ids)), cache

    def _layers(
        self, layers: Params, x: jax.Array, context: Context, cache: Cache | None, key: jax.Array | None, remat: bool
    ) -> tuple[jax.Array, Cache | None]:
        """Every block in turn: one compiled body, scanned over the stack."""

        def body(carry: tuple[jax.Array, Cache | None], layer: tuple) -> tuple[tuple[jax.Array, Cache | None], None]:
            x, cache = carry
            index, params = layer
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, index)}
            return self.block(self.config).apply({"params": params}, x, context, cache, index, rngs=rngs), None

        # Without remat only the dear values are kept: norms, rotations and activations cost less again than in memory.
        policy = None if remat else jax.checkpoint_policies.save_only_these_names(SAVED)
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        indices = jnp.arange(self.config.num_hidden_layers)
        (x, cache), _ = jax.lax.scan(body, (x, cache), (indices, layers))
        return x, cache
