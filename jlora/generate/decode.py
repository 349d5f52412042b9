"""The decode loop, all of it inside one jit: prefill, then a token a row and round until every row has stopped."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.generate.sampling import sample
from jlora.models import Cache, Model
from jlora.types import Params


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_ids", "greedy", "top_k", "top_p"))
def decode(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    greedy: bool,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Int[Array, "B new"], Int[Array, "B"]]:
    """(new tokens, how many of them count): a row's count ends with its first stop token, which is included.

    Args:
        tokens: prompts padded on the left.
        lengths: tokens of each prompt.
        keys: one random key a row.
        greedy: take the likeliest token; the sampling settings are not looked at.
    """
    batch, width = tokens.shape
    columns = jnp.arange(width)[None, :]
    padding = width - lengths[:, None]
    positions, segment_ids = jnp.maximum(columns - padding, 0), (columns >= padding).astype(jnp.int32)
    cache = model.empty_cache(params, batch, width + max_new_tokens)
    hidden, cache = model.hidden(params, tokens, positions, segment_ids, cache=cache)

    def choose(i: jax.Array, logits: jax.Array) -> jax.Array:
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
        return sample(logits, step_keys, temperature=temperature, top_k=top_k, top_p=top_p)

    def running(carry: tuple) -> jax.Array:
        i, _, done, *_ = carry
        return (i < max_new_tokens) & ~jnp.all(done)

    def body(carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, Cache]) -> tuple:
        i, new, done, counts, logits, cache = carry
        token = choose(i, logits)
        new = jax.lax.dynamic_update_slice_in_dim(new, token[:, None], i, axis=1)
        counts = jnp.where(done, counts, i + 1)
        for stop in stop_ids:
            done = done | (token == stop)
        ones = jnp.ones((batch, 1), jnp.int32)
        hidden, cache = model.hidden(params, token[:, None], (lengths + i)[:, None], ones, cache=cache)
        return i + 1, new, done, counts, model.logits(params, hidden[:, 0]), cache

    start = (
        jnp.int32(0),
        jnp.zeros((batch, max_new_tokens), jnp.int32),
        lengths == 0,
        jnp.zeros(batch, jnp.int32),
        model.logits(params, hidden[:, -1]),
        cache,
    )
    _, new, _, counts, *_ = jax.lax.while_loop(running, body, start)
    return new, counts
