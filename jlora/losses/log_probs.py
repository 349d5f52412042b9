"""Log-probabilities of given tokens, with gradients, that never hold [B, T, V] logits."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.lora import combine, split
from jlora.losses.chunks import Chunks, Project, target_logits
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
        head: the leaves that `project` takes; adapters among them get gradients, the rest is constant.
    """
    frozen, trainable = split(head)
    log_probs, *rest = _scores(project, chunk, trainable, hidden, frozen, targets, weights, jnp.float32(temperature))
    return TokenScores(log_probs, *map(jax.lax.stop_gradient, rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(
    project: Project,
    chunk: int,
    trainable: Params,
    hidden: jax.Array,
    frozen: Params,
    targets: jax.Array,
    weights: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, ...]:
    """The four scores."""
    head = combine(frozen, trainable)
    chunks = Chunks.of(project, head, hidden, weights, chunk)
    hidden, targets = chunks.front(hidden), chunks.front(targets)

    def body(i: jax.Array, scores: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        h, t, w = chunks.chunk(i, hidden, targets, chunks.weights)
        found = _chunk(chunks.logits(project, head, h) / temperature, t)
        return tuple(chunks.put(all_, jnp.where(w != 0, new, 0), i) for all_, new in zip(scores, found, strict=True))

    start = (jnp.zeros(chunks.weights.shape, jnp.float32),) * 4
    return tuple(map(chunks.back, jax.lax.fori_loop(0, chunks.count, body, start)))


def _scores_forward(project: Project, chunk: int, *inputs: Any) -> tuple[tuple[jax.Array, ...], tuple]:
    return _scores(project, chunk, *inputs), inputs


def _scores_backward(project: Project, chunk: int, inputs: tuple, cotangents: tuple[jax.Array, ...]) -> tuple:
    trainable, hidden, frozen, targets, weights, temperature = inputs
    chunks = Chunks.of(project, combine(frozen, trainable), hidden, weights, chunk)
    cotangent = jnp.where(chunks.weights != 0, chunks.front(cotangents[0]), 0)
    hidden, targets = chunks.front(hidden), chunks.front(targets)

    def body(i: jax.Array, grads: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
        h, t, g = chunks.chunk(i, hidden, targets, cotangent)

        def log_probs(trainable: Params, h: jax.Array) -> jax.Array:
            logits = chunks.logits(project, combine(frozen, trainable), h) / temperature
            return target_logits(logits, t) - jax.nn.logsumexp(logits, axis=-1)

        _, pullback = jax.vjp(log_probs, trainable, h)
        chunk_trainable, chunk_hidden = pullback(g)
        return jax.tree.map(jnp.add, grads[0], chunk_trainable), chunks.put(grads[1], chunk_hidden, i)

    start = (jax.tree.map(jnp.zeros_like, trainable), jnp.zeros_like(hidden))
    grad_trainable, grad_hidden = jax.lax.fori_loop(0, chunks.count, body, start)
    return grad_trainable, chunks.back(grad_hidden), None, None, None, None


_scores.defvjp(_scores_forward, _scores_backward)


def _chunk(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    of_target, total = target_logits(logits, targets), jax.nn.logsumexp(logits, axis=-1)
    log_probs = logits - total[..., None]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    correct = (of_target >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    return of_target - total, entropy, correct, jnp.mean(logits, axis=-1)
