"""The training jit boundary: one optimizer step as a pure function of (state, frozen, batch)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jlora import lora
from jlora.optim import global_norm
from jlora.train.state import TrainState
from jlora.types import Params

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (params, micro-batch [B, T], dropout key or None) → (sum of the loss, sums to report)
Loss = Callable[[Params, Batch, jax.Array | None], tuple[jax.Array, Metrics]]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, shardings: TrainState, *, dropout: bool = False
) -> Step:
    """step(state, frozen, batch) → (state, metrics), jitted; it donates the state and never the frozen weights.

    The batch's leaves are [A, B, T]: A micro-batches, one after another. The loss is Σ over all of them divided once
    by the weight of all of them, so accumulation equals the large batch whatever the micro-batches hold.

    Args:
        shardings: those the state was created under; it is returned under the same.
        dropout: hand the loss a random key of its own for each micro-batch.
    """

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        total = jnp.maximum(jnp.sum(batch["weights"]), 1)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step) if dropout else None

        def micro(index: jax.Array, micro_batch: Batch) -> tuple[Params, Metrics]:
            micro_key = None if key is None else jax.random.fold_in(key, index)

            def scaled(trainable: Params) -> tuple[jax.Array, Metrics]:
                value, sums = loss(lora.combine(frozen, trainable), micro_batch, micro_key)
                return value / total, sums

            return jax.grad(scaled, has_aux=True)(state.trainable)

        grads, sums = _accumulate(micro, batch)
        updates, moments = optimizer.update(grads, state.moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = sums | {"grad_norm": global_norm(grads)}
        return TrainState(state.step + 1, trainable, moments, state.key), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _accumulate(micro: Callable, batch: Batch) -> tuple[Params, Metrics]:
    """Σ micro(i, micro-batch i); a single one needs no loop."""
    count = batch["weights"].shape[0]
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    if count == 1:
        return micro(jnp.int32(0), first)
    shapes = jax.eval_shape(micro, jnp.int32(0), first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(sums: tuple, item: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, sums, micro(*item)), None

    return jax.lax.scan(body, zeros, (jnp.arange(count), batch))[0]
