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
from jlora.lora.sites import is_expert
from jlora.optim import global_norm, gradient_point
from jlora.train.state import TrainState
from jlora.types import Params

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array | np.ndarray]
FINITE = "finite"  # key of a step's metrics: whether everything it computed is finite
Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


class Report(NamedTuple):
    """What a micro-batch reports besides its loss.

    Attributes:
        sums: scalars that are added up over the micro-batches of a step.
        items: arrays [N] with one number per item, which a step returns as [A, N].
    """

    sums: Metrics
    items: Metrics = {}  # noqa: RUF012 (never written to)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step minimises.

    Attributes:
        loss: (trainable, frozen, micro-batch, totals, dropout key or None) → (its part of the step's loss, report). The
            parts of all micro-batches add up to the step's loss.
        totals: (the step's batch, leaves [A, …]) → sums over the whole batch, which the parts are divided by.
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
    """Returns a jitted step(state, frozen, batch) → (state, metrics) that donates the state but not the frozen weights.

    The batch's leaves are [A, …], for A micro-batches that are computed one at a time. The loss's denominators are
    counted over all of them, so accumulation equals one large batch whatever each micro-batch holds.

    The metrics are the report's sums and items, the loss ("loss"), the gradient's norm before clipping ("grad_norm"),
    and `FINITE`.

    Args:
        shardings: the state's shardings, before and after the step.
        dropout: give the loss a separate random key for each micro-batch.
        skip: if a step's numbers are not finite, leave the adapters and their moments unchanged.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        after, metrics = _advance(objective, optimizer, dropout, state, frozen, batch)
        return _skipping(state, after, metrics[FINITE]) if skip else after, metrics

    return sharding.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def make_steps(
    objective: Objective,
    optimizer: Callable[[Any], optax.GradientTransformation],
    shardings: TrainState,
    *,
    dropout: bool = False,
    skip: bool = False,
) -> Step:
    """The step of K adapters side by side, each advanced as `make_step` would advance it alone.

    The state is that of `create_states`; the metrics' leaves are [K, …] too; frozen is {"base": what all adapters
    share, "settings": the adapters' own, [K, …], "optim": what the optimizer has for each, [K, …]}; the batch's leaves
    are [A, K, …].

    An adapter whose numbers are not finite does not hold up the others. Without `skip` it keeps the weights it had
    before that step from then on.

    Args:
        optimizer: an adapter's part of "optim" → its optimizer.
    """
    spare = _skipping if skip else _freezing

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        def one(own: tuple[TrainState, Params, Any, Batch]) -> tuple[TrainState, Metrics]:
            begun, settings, optim, part = own
            begun = dataclasses.replace(begun, step=state.step)
            whole = lora.combine(frozen["base"], settings)
            after, metrics = _advance(objective, optimizer(optim), dropout, begun, whole, part)
            return dataclasses.replace(spare(begun, after, metrics[FINITE]), step=None), metrics

        parts = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batch)
        own = (dataclasses.replace(state, step=None), frozen["settings"], frozen["optim"], parts)
        # JAX has no batched grouped product, so with experts the adapters are computed one at a time.
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
    point = gradient_point(state.trainable, state.moments)

    def micro(index: jax.Array, micro_batch: Batch) -> tuple[tuple[Params, jax.Array, Metrics], Metrics]:
        micro_key = None if key is None else jax.random.fold_in(key, index)

        def loss(trainable: Params) -> tuple[jax.Array, Report]:
            return objective.loss(trainable, frozen, micro_batch, totals, micro_key)

        (value, report), grads = jax.value_and_grad(loss, has_aux=True)(point)
        # Those of 16-bit weights have 16 bits: their sums and moments need more.
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
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
    """The state after a step, or the one before it if the step is not finite.

    The step counter and the schedule advance either way.
    """

    def scheduled(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def choose(old: Any, new: Any) -> Any:
        return new if scheduled(new) else jnp.where(finite, new, old)

    trainable = jax.tree.map(choose, before.trainable, after.trainable)
    moments = jax.tree.map(choose, before.moments, after.moments, is_leaf=scheduled)
    return dataclasses.replace(after, trainable=trainable, moments=moments)


def _freezing(before: TrainState, after: TrainState, finite: jax.Array) -> TrainState:
    """The state after a step, but with the adapter from before it if the step is not finite.

    Its moments then become NaN and stay NaN, so no later update is finite either, even after a resume, and the adapter
    never changes again.
    """

    def mark(leaf: jax.Array) -> jax.Array:
        return jnp.where(finite, leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    trainable = jax.tree.map(lambda old, new: jnp.where(finite, new, old), before.trainable, after.trainable)
    return dataclasses.replace(after, trainable=trainable, moments=jax.tree.map(mark, after.moments))


def _accumulate(micro: Callable, batch: Batch) -> tuple[Any, Metrics]:
    """The sum of the first results of micro(i, micro-batch i), and the second ones stacked."""
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
