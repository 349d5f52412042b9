"""The state of training: trained weights, moments, step counter and random key. Frozen weights are not part of it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jlora import sharding, tree
from jlora.types import Params


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "trainable", "moments", "key"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The carry of training. Its leaves may also be shapes or shardings instead of arrays.

    Attributes:
        step: int32, optimizer steps done.
        trainable: the trained half of the params.
        moments: the optimizer's state.
        key: random key data (uint32) that each step's dropout key is derived from.
    """

    step: Any
    trainable: Any
    moments: optax.OptState
    key: Any


def create_state(
    trainable: Params, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, *, donate: bool = False
) -> TrainState:
    """The state before the first step, with the shardings that every step returns it with.

    Shapes in place of arrays in `trainable` give the state's shapes.

    Args:
        donate: let the state have the very arrays of `trainable`, which can no longer be used.
    """

    def create(trainable: Params) -> TrainState:
        return TrainState(jnp.int32(0), trainable, optimizer.init(trainable), _key_data(seed))

    return _created(create, trainable, mesh, donate)


def create_states(
    trainable: Params, optimizer: optax.GradientTransformation, seeds: Sequence[int], mesh: Mesh
) -> TrainState:
    """The state of K adapters trained side by side: every leaf but the step is [K, …]."""

    def create(trainable: Params) -> TrainState:
        keys = jnp.stack([_key_data(seed) for seed in seeds])
        return TrainState(jnp.int32(0), trainable, jax.vmap(optimizer.init)(trainable), keys)

    return _created(create, trainable, mesh)


def _key_data(seed: int) -> jax.Array:
    return jax.random.key_data(jax.random.key(seed))


def _created(create: Callable[[Params], TrainState], trainable: Params, mesh: Mesh, donate: bool = False) -> TrainState:
    """The created state; its shapes if `trainable` holds shapes instead of arrays."""
    shapes = jax.eval_shape(create, trainable)
    shardings = state_shardings(shapes, mesh)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trainable)):
        return tree.abstract(shapes, shardings)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0 if donate else ())(trainable)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """The state's shardings: weights are split by their rules, and moments like their weight.

    Counters, keys, and moments of another shape that cannot be split so are replicated.
    """
    trained = sharding.tree_shardings(state.trainable, mesh)
    places, weights = tree.flatten(trained), tree.flatten(state.trainable)
    everywhere = sharding.replicated(mesh)

    def moment(path: tuple, leaf: Any) -> NamedSharding:
        # Optimizers keep moments in trees shaped like the params, each an array or several: the last dict keys of a
        # moment's path are its parameter's path.
        runs = itertools.groupby(path, lambda key: isinstance(key, jax.tree_util.DictKey))
        keys = [[key.key for key in run] for is_dict, run in runs if is_dict]
        name = "/".join(keys[-1]) if keys else ""
        whole = name in places and len(leaf.shape) == len(weights[name].shape)
        return places[name] if whole and _splits(places[name], leaf.shape) else everywhere

    moments = jax.tree_util.tree_map_with_path(moment, state.moments)
    return TrainState(everywhere, trained, moments, everywhere)


def _splits(place: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether the sharding cuts arrays of this shape into equal parts."""
    try:
        place.shard_shape(shape)
    except ValueError:
        return False
    return True
