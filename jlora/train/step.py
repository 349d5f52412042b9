"""The training jit boundary: one optimizer step as a pure function of (state, frozen, batch)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora import lora, sharding, tree
from jlora.lora.targets import is_expert
from jlora.optim import global_norm
from jlora.train.state import TrainState
from jlora.types import Params

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array | np.ndarray]
FINITE = "finite"  # of a step's metrics: whether everything that it computed is
Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


class Report(NamedTuple):
    """What a micro-batch tells besides its loss.

    Attributes:
        sums: scalars that add up over the micro-batches of a step.
        items: arrays [N] of one number an item, which a step returns as [A, N].
    """

    sums: Metrics
    items: Metrics = {}  # noqa: RUF012 (never written to)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step minimises.

    Attributes:
        loss: (trainable, frozen, micro-batch, totals, dropout key or None) → (its part of the step's loss, report). The
            parts add up over the micro-batches to the loss of the step.
        totals: (the step's batch, leaves [A, …]) → sums over all of it, by which the parts are divided.
    """

    loss: Callable[[Params, Any, Batch, Metrics, jax.Array | None], tuple[jax.Array, Report]]
    totals: Callable[[Batch], Metrics]


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    *,
    dropout: bool = False,
    skip: bool = False,
) -> Step:
    """step(state, frozen, batch) → (state, metrics), jitted; it donates the state and never the frozen weights.

    The batch's leaves are [A, …]: A micro-batches, one after another. What the loss is divided by is counted over all
    of them, so accumulation equals the large batch whatever the micro-batches hold.

    Args:
        shardings: those the state was created under; it is returned under the same.
        dropout: hand the loss a random key of its own for each micro-batch.
        skip: a step whose numbers are not finite leaves the adapters and their moments as they were.

    The metrics are the report's sums and items, the loss and the gradient's norm, and `FINITE`.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        after, metrics = _advance(objective, optimizer, dropout, state, frozen, batch)
        return _skipping(state, after, metrics[FINITE]) if skip else after, metrics

    return sharding.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def make_steps(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    *,
    dropout: bool = False,
    skip: bool = False,
) -> Step:
    """The step of K adapters side by side, each as `make_step` would advance it alone.

    state and metrics are those of `create_states`, [K, …]; frozen is {"base": what all share, "settings": [K, …] of the
    adapters, "rate": [K] factors of the learning rate}; the batch's leaves are [A, K, …].

    An adapter whose numbers are not finite does not hold up the others. Without `skip` it stays what it was before that
    step, at every later step too.
    """
    spare = _skipping if skip else _freezing

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        def one(own: tuple[TrainState, Params, jax.Array, Batch]) -> tuple[TrainState, Metrics]:
            begun, settings, rate, part = own
            begun = dataclasses.replace(begun, step=state.step)
            scaled = optax.chain(optimizer, optax.scale(rate))
            after, metrics = _advance(objective, scaled, dropout, begun, lora.combine(frozen["base"], settings), part)
            return dataclasses.replace(spare(begun, after, metrics[FINITE]), step=None), metrics

        parts = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batch)
        own = (dataclasses.replace(state, step=None), frozen["settings"], frozen["rate"], parts)
        # JAX has no grouped product for several batches at once: on experts the adapters go one after another.
        experts = any(map(is_expert, tree.flatten(frozen["base"])))
        after, metrics = jax.lax.map(one, own) if experts else jax.vmap(one)(own)
        return dataclasses.replace(after, step=state.step + 1), metrics

    return sharding.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def _advance(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    dropout: bool,
    state: TrainState,
    frozen: Any,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    totals = objective.totals(batch)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step) if dropout else None

    def micro(index: jax.Array, micro_batch: Batch) -> tuple[tuple[Params, jax.Array, Metrics], Metrics]:
        micro_key = None if key is None else jax.random.fold_in(key, index)

        def loss(trainable: Params) -> tuple[jax.Array, Report]:
            return objective.loss(trainable, frozen, micro_batch, totals, micro_key)

        (value, report), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        return (grads, value, report.sums), report.items

    (grads, value, sums), items = _accumulate(micro, batch)
    updates, moments = optimizer.update(grads, state.moments, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics = sums | items | {"loss": value, "grad_norm": global_norm(grads)}
    metrics[FINITE] = _all_finite((value, metrics["grad_norm"], trainable, moments))
    return TrainState(state.step + 1, trainable, moments, state.key), metrics


def _all_finite(values: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(values) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in floats])


def _skipping(before: TrainState, after: TrainState, finite: jax.Array) -> TrainState:
    """The state after a step, or before it where that is not finite; the step and the schedule advance either way."""

    def scheduled(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def choose(old: Any, new: Any) -> Any:
        return new if scheduled(new) else jnp.where(finite, new, old)

    trainable = jax.tree.map(choose, before.trainable, after.trainable)
    moments = jax.tree.map(choose, before.moments, after.moments, is_leaf=scheduled)
    return dataclasses.replace(after, trainable=trainable, moments=moments)


def _freezing(before: TrainState, after: TrainState, finite: jax.Array) -> TrainState:
    """The state after a step, with the adapter before it where that is not finite. Its moments become NaN and stay so:
    no later update is finite either, after a resume too, and the adapter remains what it is.
    """

    def mark(leaf: jax.Array) -> jax.Array:
        return jnp.where(finite, leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    trainable = jax.tree.map(lambda old, new: jnp.where(finite, new, old), before.trainable, after.trainable)
    return dataclasses.replace(after, trainable=trainable, moments=jax.tree.map(mark, after.moments))


def _accumulate(micro: Callable, batch: Batch) -> tuple[Any, Metrics]:
    """Σ of the first of micro(i, micro-batch i), and the second stacked; a single one needs no loop."""
    count = len(jax.tree.leaves(batch)[0])
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    if count == 1:
        total, items = micro(jnp.int32(0), first)
        return total, jax.tree.map(lambda leaf: leaf[None], items)
    shapes, _ = jax.eval_shape(micro, jnp.int32(0), first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(sums: tuple, item: tuple) -> tuple[tuple, Metrics]:
        found, items = micro(*item)
        return jax.tree.map(jnp.add, sums, found), items

    return jax.lax.scan(body, zeros, (jnp.arange(count), batch))
