"""Next-token cross-entropy without ever holding [B, T, V] logits, and without computing those of untrained tokens."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.lora import combine, split
from jlora.losses.chunks import Chunks, columns_of, count, target_logits
from jlora.types import Params

Project = Callable[[Params, jax.Array], jax.Array]


class TokenSums(NamedTuple):
    """Sums over trained tokens, float32 scalars.

    Attributes:
        loss: weighted negative log-likelihood, in nats.
        correct: weight of the tokens whose likeliest prediction is the target.
        weight: total weight, the number of trained tokens.
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
    chunk: int = 512,
) -> TokenSums:
    """Σ weight · -log softmax(project(head, hidden))[target], in float32.

    In every row the trained tokens are moved to the front; then chunks of about `chunk` tokens are projected one after
    another, and only as many as hold a trained token. A chunk's gradient is computed together with its loss, while its
    logits exist (the loss is the last thing in the network and linear in these terms), so nothing is projected twice.

    Args:
        project: (head, hidden [..., D]) → float32 logits [..., V].
        head: its leaves; adapters among them get gradients, the rest is constant.
        weights: 0 where no loss is taken.
        chunk: tokens whose logits exist at once.
    """
    frozen, trainable = split(head)
    chunks = Chunks.of(weights, chunk)
    front = chunks.front
    sums = _sums(project, chunks.columns, trainable, front(hidden), frozen, front(targets), front(weights))
    return TokenSums(sums[0], jax.lax.stop_gradient(sums[1]), jnp.sum(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(
    project: Project,
    columns: int,
    trainable: Params,
    hidden: jax.Array,
    frozen: Params,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(loss, correct) summed over chunks of `columns` tokens of every row."""

    def body(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, t, w = (columns_of(values, i, columns) for values in (hidden, targets, weights))
        return jax.tree.map(jnp.add, sums, _chunk(project(combine(frozen, trainable), h), t, w))

    zero = jnp.float32(0)
    return jax.lax.fori_loop(0, count(weights, columns), body, (zero, zero))


def _sums_forward(
    project: Project,
    columns: int,
    trainable: Params,
    hidden: jax.Array,
    frozen: Params,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Params, jax.Array]]:
    """The sums, and as residuals the gradients of the loss."""

    def body(i: jax.Array, carry: tuple) -> tuple:
        sums, grad_trainable, grad_hidden = carry
        h, t, w = (columns_of(values, i, columns) for values in (hidden, targets, weights))

        def loss(trainable: Params, h: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _chunk(project(combine(frozen, trainable), h), t, w)

        value, pullback, correct = jax.vjp(loss, trainable, h, has_aux=True)
        chunk_trainable, chunk_hidden = pullback(jnp.float32(1))
        grad_trainable = jax.tree.map(jnp.add, grad_trainable, chunk_trainable)
        grad_hidden = jax.lax.dynamic_update_slice_in_dim(grad_hidden, chunk_hidden, i * columns, axis=1)
        return (sums[0] + value, sums[1] + correct), grad_trainable, grad_hidden

    zero = jnp.float32(0)
    start = ((zero, zero), jax.tree.map(jnp.zeros_like, trainable), jnp.zeros_like(hidden))
    sums, *grads = jax.lax.fori_loop(0, count(weights, columns), body, start)
    return sums, tuple(grads)


def _sums_backward(project: Project, columns: int, grads: tuple, cotangents: tuple) -> tuple:
    scaled = jax.tree.map(lambda grad: grad * cotangents[0].astype(grad.dtype), grads)
    return *scaled, None, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _chunk(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(loss, correct) of one chunk's logits."""
    of_target = target_logits(logits, targets)
    correct = of_target >= jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    nll = jax.nn.logsumexp(logits, axis=-1) - of_target
    return jnp.sum(nll * weights), jnp.sum(correct * weights)
