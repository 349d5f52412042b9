"""Log-probabilities of given tokens, with gradients, without ever holding [B, T, V] logits."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.lora import combine, split
from jlora.losses.chunks import Chunks, columns_of, count, target_logits
from jlora.losses.cross_entropy import Project
from jlora.types import Params


class TokenScores(NamedTuple):
    """What a model says of every target, float32 [B, T], 0 where the weight is 0; only the first has gradients.

    Attributes:
        log_probs: of the target, in nats.
        entropy: of the prediction, in nats.
        correct: 1 where the target is the likeliest token.
        mean_logits: over the vocabulary.
    """

    log_probs: jax.Array
    entropy: jax.Array
    correct: jax.Array
    mean_logits: jax.Array


def token_scores(
    project: Project,
    head: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int = 512,
    temperature: int | float | Float[Array, ""] = 1.0,
) -> TokenScores:
    """log softmax(project(head, hidden) / temperature)[target] and what goes with it, where weights are not 0.

    Only chunks of about `chunk` tokens have logits at a time, and tokens of weight 0 cost nothing (see `Chunks`). The
    backward pass projects each chunk again, for a token's log-probability may enter a loss in any way.

    Args:
        project: (head, hidden [..., D]) → float32 logits [..., V].
        head: its leaves; adapters among them get gradients, the rest is constant.
    """
    frozen, trainable = split(head)
    chunks = Chunks.of(weights, chunk)
    front = chunks.front(hidden), chunks.front(targets), chunks.front(weights)
    scores = _scores(project, chunks.columns, trainable, front[0], frozen, *front[1:], jnp.float32(temperature))
    log_probs, *rest = (chunks.back(values) for values in scores)
    return TokenScores(log_probs, *map(jax.lax.stop_gradient, rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(
    project: Project,
    columns: int,
    trainable: Params,
    hidden: jax.Array,
    frozen: Params,
    targets: jax.Array,
    weights: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, ...]:
    """The four scores in front order."""

    def body(i: jax.Array, scores: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        h, t, w = (columns_of(values, i, columns) for values in (hidden, targets, weights))
        found = _chunk(project(combine(frozen, trainable), h) / temperature, t)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_, jnp.where(w != 0, new, 0), i * columns, axis=1)
            for all_, new in zip(scores, found, strict=True)
        )

    return jax.lax.fori_loop(0, count(weights, columns), body, (jnp.zeros(weights.shape, jnp.float32),) * 4)


def _scores_forward(project: Project, columns: int, *inputs: Any) -> tuple[tuple[jax.Array, ...], tuple]:
    return _scores(project, columns, *inputs), inputs


def _scores_backward(project: Project, columns: int, inputs: tuple, cotangents: tuple[jax.Array, ...]) -> tuple:
    trainable, hidden, frozen, targets, weights, temperature = inputs
    cotangent = jnp.where(weights != 0, cotangents[0], 0)

    def body(i: jax.Array, grads: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
        h, t, g = (columns_of(values, i, columns) for values in (hidden, targets, cotangent))

        def log_probs(trainable: Params, h: jax.Array) -> jax.Array:
            logits = project(combine(frozen, trainable), h) / temperature
            return target_logits(logits, t) - jax.nn.logsumexp(logits, axis=-1)

        _, pullback = jax.vjp(log_probs, trainable, h)
        chunk_trainable, chunk_hidden = pullback(g)
        grad_hidden = jax.lax.dynamic_update_slice_in_dim(grads[1], chunk_hidden, i * columns, axis=1)
        return jax.tree.map(jnp.add, grads[0], chunk_trainable), grad_hidden

    start = (jax.tree.map(jnp.zeros_like, trainable), jnp.zeros_like(hidden))
    return *jax.lax.fori_loop(0, count(weights, columns), body, start), None, None, None, None


_scores.defvjp(_scores_forward, _scores_backward)


def _chunk(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    of_target, total = target_logits(logits, targets), jax.nn.logsumexp(logits, axis=-1)
    log_probs = logits - total[..., None]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    correct = (of_target >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    return of_target - total, entropy, correct, jnp.mean(logits, axis=-1)
