"""Which experts a token goes to, and what each of them counts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.families.family import Experts


def choose(
    logits: Float[Array, "N E"], experts: Experts, correction: Float[Array, "E"] | None = None
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """(float32 weights, numbers) of the `top_k` experts of every token.

    Args:
        logits: the router's.
        correction: what is added to scores where experts are compared, though not to their weights.
    """
    logits = logits.astype(jnp.float32)
    scores = jax.nn.sigmoid(logits) if experts.sigmoid else jax.nn.softmax(logits, axis=-1)
    ranked = scores if correction is None else scores + correction.astype(jnp.float32)[None]
    if experts.groups > 1:
        ranked = jnp.where(_in_best_groups(ranked, experts), ranked, -jnp.inf)
    _, chosen = jax.lax.top_k(ranked, experts.top_k)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + experts.least)
    return weights if experts.scaling == 1 else weights * experts.scaling, chosen


def _in_best_groups(ranked: jax.Array, experts: Experts) -> jax.Array:
    """Whether an expert [N, E] is in one of the `top_groups` groups whose two best experts together rank highest."""
    by_group = ranked.reshape(len(ranked), experts.groups, -1)
    totals = jnp.sum(jax.lax.top_k(by_group, 2)[0], axis=-1)
    _, best = jax.lax.top_k(totals, experts.top_groups)
    kept = jnp.any(jax.nn.one_hot(best, experts.groups, dtype=jnp.bool_), axis=1)
    return jnp.repeat(kept, experts.count // experts.groups, axis=1)
