"""The next token from logits, and how likely it was."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(
    logits: Float[Array, "B V"], keys: jax.Array, *, temperature: float | jax.Array, top_k: int, top_p: float
) -> Int[Array, "B"]:
    """One token per row, drawn from softmax(logits / temperature) cut to the `top_k` likeliest and the nucleus `top_p`.

    Args:
        keys: one random key per row, so that a row's draw does not depend on its neighbours.
        top_k: how many of the likeliest tokens are kept; 0 keeps all.
        top_p: the smallest set of tokens whose probabilities reach this sum is kept (Holtzman et al. 2019); 1 keeps
            all.
    """
    logits = logits / temperature
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        logits = _nucleus(logits, top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def log_prob(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"], *, temperature: float | jax.Array
) -> Float[Array, "B"]:
    """log softmax(logits / temperature) of one token per row, in float32, over the whole vocabulary."""
    logits = logits.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
