"""Schedule-free training: the weights are an average, and gradients are taken between it and the newest step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora.optim.narrow import Masters, Rounding, widened
from jlora.types import Params


class AveragedState(NamedTuple):
    """What averaging adds to an optimizer's state.

    Attributes:
        newest: z, the weights that the updates have gone to. The average x is what is trained: it is in the place of
            the weights, so that whatever reads trained weights reads x.
        b1: the share of x in the point where gradients are taken.
        weight_sum: sum of the squared learning rates so far.
        schedule: the count of steps, skipped ones included.
        inner: the optimizer's state.
    """

    newest: Params
    b1: jax.Array
    weight_sum: jax.Array
    schedule: optax.ScaleByScheduleState
    inner: Any


def averaged(inner: optax.GradientTransformation, schedule: optax.Schedule, b1: float) -> optax.GradientTransformation:
    """Schedule-free averaging (Defazio et al. 2024) of where an optimizer without momentum goes.

    With y = b1 · x + (1 - b1) · z, the inner optimizer moves z by the gradient at y, and x moves towards z by the share
    that this step's squared learning rate has in the sum of all of them. The rate must not fall.

    Returns:
        A transformation of gradients at `gradient_point` into updates of x.
    """

    def init(params: Params) -> AveragedState:
        counted = optax.ScaleByScheduleState(jnp.int32(0))
        # A copy: two leaves that were one buffer could not both be donated.
        newest = jax.tree.map(jnp.copy, params)
        return AveragedState(newest, jnp.float32(b1), jnp.float32(0), counted, inner.init(params))

    def update(grads: Params, state: AveragedState, params: Params) -> tuple[Params, AveragedState]:
        moves, after = inner.update(grads, state.inner, gradient_point(params, state))
        newest = optax.apply_updates(state.newest, moves)
        weight = schedule(state.schedule.count) ** 2
        weight_sum = state.weight_sum + weight
        share = jnp.where(weight_sum > 0, weight / jnp.where(weight_sum > 0, weight_sum, 1), 0)
        updates = jax.tree.map(lambda z, x: share * (z - x), newest, params)
        counted = optax.ScaleByScheduleState(state.schedule.count + 1)
        return updates, AveragedState(newest, state.b1, weight_sum, counted, after)

    return optax.GradientTransformation(init, update)


def gradient_point(params: Params, state: optax.OptState) -> Params:
    """The weights at which an optimizer in this state wants gradients: `params` unless it averages."""
    if isinstance(state, Masters | Rounding) and isinstance(state.inner, AveragedState):
        point = gradient_point(widened(params, state), state.inner)
        return jax.tree.map(lambda leaf, wide: wide.astype(leaf.dtype), params, point)
    if not isinstance(state, AveragedState):
        return params
    return jax.tree.map(lambda x, z: (1 - state.b1) * z + state.b1 * x, params, state.newest)
