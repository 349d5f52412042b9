"""Weights of 16 bits, which rounding would keep from taking small updates: float32 copies, or random rounding."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, UInt32

from jlora import tree
from jlora.types import Params


class Masters(NamedTuple):
    """The state of `with_masters`.

    Attributes:
        weights: float32, those that have fewer bits in the model.
        inner: the state of the optimizer that updates them.
    """

    weights: Params
    inner: optax.OptState


def with_masters(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer on float32 copies of weights of fewer bits, which become the copies, rounded."""

    def init(params: Params) -> Masters:
        narrow = {path: leaf for path, leaf in tree.flatten(params).items() if leaf.dtype != jnp.float32}
        return Masters(_wide(tree.unflatten(narrow)), optimizer.init(_wide(params)))

    def update(grads: Params, state: Masters, params: Params) -> tuple[Params, Masters]:
        before = widened(params, state)
        updates, inner = optimizer.update(grads, state.inner, before)
        after = tree.flatten(optax.apply_updates(before, updates))
        kept = tree.unflatten({path: after[path] for path in tree.flatten(state.weights)})
        return _towards(after, params, updates), Masters(kept, inner)

    return optax.GradientTransformation(init, update)


class Rounding(NamedTuple):
    """The state of `rounded_at_random`: the number of steps done, and the optimizer's own state."""

    count: jax.Array
    inner: optax.OptState


def rounded_at_random(optimizer: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """The optimizer in float32 on bfloat16 weights, each of whose sums is rounded up or down, right on average."""

    def init(params: Params) -> Rounding:
        return Rounding(jnp.int32(0), optimizer.init(_wide(params)))

    def update(grads: Params, state: Rounding, params: Params) -> tuple[Params, Rounding]:
        before = widened(params, state)
        updates, inner = optimizer.update(grads, state.inner, before)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        exact = tree.flatten(optax.apply_updates(before, updates))
        after = {path: round_at_random(exact[path], jax.random.fold_in(key, i)) for i, path in enumerate(exact)}
        return _towards(after, params, updates), Rounding(state.count + 1, inner)

    return optax.GradientTransformation(init, update)


def round_at_random(values: jax.Array, key: jax.Array) -> jax.Array:
    """float32 values as bfloat16: the one above or below, the nearer the likelier, so that the mean is the value."""
    drawn = noise(key, values.shape) >> 16
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    # bfloat16 is the upper half of float32; adding to the lower half carries over as often as it is large.
    up = jax.lax.bitcast_convert_type((bits + drawn) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(values), up, values).astype(jnp.bfloat16)


def noise(key: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Random bits for each place: a hash of the place, axis by axis, from the key on.

    `jax.random.bits` would do, but holds two counters for each number while it computes them: gigabytes for a large
    stack. This is computed where it is used.
    """
    first, last = jax.random.key_data(key)[:2]
    found = jnp.broadcast_to(first, shape)
    for axis in range(len(shape)):
        found = _mixed(found + jax.lax.broadcasted_iota(jnp.uint32, shape, axis))
    return _mixed(found ^ last)


def _mixed(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Wellons' lowbias32: every bit of a word changes every bit of its hash about half of the time."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
    words = (words ^ (words >> 15)) * jnp.uint32(0x846CA68B)
    return words ^ (words >> 16)


def widened(params: Params, state: Masters | Rounding) -> Params:
    """The weights that the inner optimizer updates, in float32."""
    masters = tree.flatten(state.weights) if isinstance(state, Masters) else {}
    return _wide(tree.unflatten(tree.flatten(params) | masters))


def _wide(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def _towards(after: dict[str, jax.Array], params: Params, updates: Params) -> Params:
    """What optax adds to `params` so that their 16-bit leaves become those of `after`; float32 leaves take `updates`.

    The difference of two neighbours in 16 bits is exact in float32.
    """
    own = tree.flatten(updates)

    def move(path: str, leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.float32:
            return own[path]
        return after[path].astype(leaf.dtype).astype(jnp.float32) - leaf.astype(jnp.float32)

    return tree.map_with_path(move, params)


# By the names of `jlora.lora.FullConfig.weights`: (optimizer, seed) → the optimizer of weights that are held so.
FORMS: dict[str, Callable[[optax.GradientTransformation, int], optax.GradientTransformation]] = {
    "masters": lambda optimizer, seed: with_masters(optimizer),
    "stochastic": rounded_at_random,
}
