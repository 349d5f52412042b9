"""Next-token cross-entropy that never holds [B, T, V] logits and skips those of untrained tokens."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.losses.chunks import Chunks, Project, target_logits
from jlora.losses.head import Gradients, is_given, whole
from jlora.types import Params

# (negative log-likelihoods of tokens) → the tokens' terms of a loss
Term = Callable[[jax.Array], jax.Array]


def unchanged(nll: jax.Array) -> jax.Array:
    """The term of maximum likelihood: the negative log-likelihood itself."""
    return nll


class TokenSums(NamedTuple):
    """Sums over trained tokens, float32 scalars.

    Attributes:
        loss: weighted negative log-likelihood, in nats, or whatever terms were made of it.
        correct: total weight of the tokens whose target is the likeliest prediction.
        weight: total weight; with weights of 0 and 1 the number of trained tokens.
    """

    loss: jax.Array
    correct: jax.Array
    weight: jax.Array


def cross_entropy(
    project: Project,
    head: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    term: Term = unchanged,
    chunk: int = 512,
) -> TokenSums:
    """Σ weight · term(-log softmax(project(head, hidden))[target]), in float32, with sums of accuracy and weight.

    Chunks of about `chunk` tokens are projected one at a time, and only as many as hold trained tokens; if that saves
    chunks, every row's trained tokens are moved to its front first. A chunk's gradient is computed together with its
    loss, while its logits exist (the loss is the network's last operation and linear in these terms), so nothing is
    projected twice.

    Args:
        project: (head, hidden [..., D]) → float32 logits [..., V].
        head: the leaves that `project` takes; gradients are computed for those that are differentiated.
        weights: the tokens' weights in the sums, 0 where no loss is taken.
        term: a loss that is taken instead of the likelihood, token by token; a function of a module.
        chunk: tokens whose logits exist at once on a device.
    """
    sums = _sums(project, term, chunk, head, hidden, targets, weights)
    return TokenSums(sums[0], jax.lax.stop_gradient(sums[1]), jnp.sum(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(
    project: Project,
    term: Term,
    chunk: int,
    head: Params,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(loss, correct) summed over chunks."""
    chunks = Chunks.of(project, head, hidden, weights, chunk)
    hidden, targets = chunks.front(hidden), chunks.front(targets)

    def body(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, t, w = chunks.chunk(i, hidden, targets, chunks.weights)
        return jax.tree.map(jnp.add, sums, _chunk(term, chunks.logits(project, head, h), t, w))

    zero = jnp.float32(0)
    return jax.lax.fori_loop(0, chunks.count, body, (zero, zero))


def _sums_forward(
    project: Project, term: Term, chunk: int, head: Params, *rest: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[Params, jax.Array]]:
    """(the sums, residuals: the gradients of the loss)."""
    grads, (hidden, targets, weights) = Gradients.of(head), (part.value for part in rest)
    chunks = Chunks.of(project, whole(head), hidden, weights, chunk)
    hidden, targets = chunks.front(hidden), chunks.front(targets)

    def body(i: jax.Array, carry: tuple) -> tuple:
        sums, grad_head, grad_hidden = carry
        h, t, w = chunks.chunk(i, hidden, targets, chunks.weights)

        def loss(learned: Params, h: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _chunk(term, chunks.logits(project, grads.head(learned), h), t, w)

        value, pullback, correct = jax.vjp(loss, grads.learned, h, has_aux=True)
        chunk_head, chunk_hidden = pullback(jnp.float32(1))
        return (
            (sums[0] + value, sums[1] + correct),
            grads.add(grad_head, chunk_head),
            chunks.put(grad_hidden, chunk_hidden, i),
        )

    zero = jnp.float32(0)
    start = ((zero, zero), grads.zeros(), jnp.zeros_like(hidden))
    sums, grad_head, grad_hidden = jax.lax.fori_loop(0, chunks.count, body, start)
    return sums, (grads.whole(grad_head), chunks.back(grad_hidden))


def _sums_backward(project: Project, term: Term, chunk: int, grads: tuple, cotangents: tuple) -> tuple:
    if not is_given(cotangents[0]):
        return None, None, None, None
    scaled = jax.tree.map(lambda grad: grad * cotangents[0].astype(grad.dtype), grads)
    return *scaled, None, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


def _chunk(term: Term, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(loss, correct) of one chunk's logits."""
    of_target = target_logits(logits, targets)
    correct = of_target >= jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    nll = jax.nn.logsumexp(logits, axis=-1) - of_target
    return jnp.sum(term(nll) * weights), jnp.sum(correct * weights)
