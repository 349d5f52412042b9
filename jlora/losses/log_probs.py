"""Log-probabilities of given tokens, with gradients, that never hold [B, T, V] logits."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.losses.chunks import Chunks, Project, target_logits
from jlora.losses.head import Gradients, is_given, whole
from jlora.types import Params


class TokenScores(NamedTuple):
    """A model's scores of every target, float32 [B, T], 0 where the weight is 0; only `log_probs` has gradients.

    Attributes:
        log_probs: log-probability of the target, in nats.
        entropy: entropy of the prediction, in nats.
        correct: 1 where the target is the likeliest token.
        mean_logits: mean of the logits over the vocabulary.
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
    """log softmax(project(head, hidden) / temperature)[target] and the other scores, where weights are not 0.

    Logits exist for only about `chunk` tokens at a time, and tokens of weight 0 cost nothing (see `Chunks`). The
    backward pass projects each chunk again, since a token's log-probability may enter a loss in any way.

    Args:
        project: (head, hidden [..., D]) → float32 logits [..., V].
        head: the leaves that `project` takes; gradients are computed for those that are differentiated.
    """
    log_probs, *rest = _scores(project, chunk, head, hidden, targets, weights, jnp.float32(temperature))
    return TokenScores(log_probs, *map(jax.lax.stop_gradient, rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(
    project: Project,
    chunk: int,
    head: Params,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, ...]:
    """The four scores."""
    chunks = Chunks.of(project, head, hidden, weights, chunk)
    hidden, targets = chunks.front(hidden), chunks.front(targets)

    def body(i: jax.Array, scores: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        h, t, w = chunks.chunk(i, hidden, targets, chunks.weights)
        found = _chunk(chunks.logits(project, head, h) / temperature, t)
        return tuple(chunks.put(all_, jnp.where(w != 0, new, 0), i) for all_, new in zip(scores, found, strict=True))

    start = (jnp.zeros(chunks.weights.shape, jnp.float32),) * 4
    return tuple(map(chunks.back, jax.lax.fori_loop(0, chunks.count, body, start)))


def _scores_forward(
    project: Project, chunk: int, head: Params, *rest: Any
) -> tuple[tuple[jax.Array, ...], tuple[Gradients, list[jax.Array]]]:
    values = [part.value for part in rest]
    return _scores(project, chunk, whole(head), *values), (Gradients.of(head), values)


def _scores_backward(project: Project, chunk: int, residuals: tuple, cotangents: tuple) -> tuple:
    grads, (hidden, targets, weights, temperature) = residuals
    if not is_given(cotangents[0]):
        return (None,) * 5
    chunks = Chunks.of(project, grads.head(grads.learned), hidden, weights, chunk)
    cotangent = jnp.where(chunks.weights != 0, chunks.front(cotangents[0]), 0)
    hidden, targets = chunks.front(hidden), chunks.front(targets)

    def body(i: jax.Array, sums: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
        h, t, g = chunks.chunk(i, hidden, targets, cotangent)

        def log_probs(learned: Params, h: jax.Array) -> jax.Array:
            logits = chunks.logits(project, grads.head(learned), h) / temperature
            return target_logits(logits, t) - jax.nn.logsumexp(logits, axis=-1)

        _, pullback = jax.vjp(log_probs, grads.learned, h)
        chunk_head, chunk_hidden = pullback(g)
        return grads.add(sums[0], chunk_head), chunks.put(sums[1], chunk_hidden, i)

    start = (grads.zeros(), jnp.zeros_like(hidden))
    grad_head, grad_hidden = jax.lax.fori_loop(0, chunks.count, body, start)
    return grads.whole(grad_head), chunks.back(grad_hidden), None, None, None


_scores.defvjp(_scores_forward, _scores_backward, symbolic_zeros=True)


def _chunk(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    of_target, total = target_logits(logits, targets), jax.nn.logsumexp(logits, axis=-1)
    log_probs = logits - total[..., None]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    correct = (of_target >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    return of_target - total, entropy, correct, jnp.mean(logits, axis=-1)
