"""Adam with moments in 8 bits: blocks of dynamic codes, as in bitsandbytes' optimizers (Dettmers et al. 2021)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from jlora.lora.kinds import own_axes
from jlora.quant.lookups import lookup
from jlora.quant.scales import dynamic_map
from jlora.types import Params

BLOCK = 256
# Smaller weights keep moments of 32 bits, as in bitsandbytes.
LEAST = 4096
# Larger stacks are updated one layer at a time, so that no more than a layer's moments are ever unpacked.
AT_ONCE = 2**25


class Blocks(NamedTuple):
    """A moment in 8 bits.

    The blocks lie along one axis, so that a mesh splits codes as it splits the weight; the last may be shorter.

    Attributes:
        codes: in the shape of the weight.
        absmax: the largest magnitude of each block.
    """

    codes: UInt8[Array, "..."]
    absmax: Float[Array, "..."]


class BlockwiseState(NamedTuple):
    """Adam's state; each moment is `Blocks`, or an array for a small weight."""

    count: jax.Array
    mu: Params
    nu: Params


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's steps, from moments that are unpacked, updated and packed again in every step.

    A step uses the new moments before they are packed.
    """

    def init(params: Params) -> BlockwiseState:
        def zeros(*, signed: bool) -> Params:
            def zero(path: tuple, leaf: jax.Array) -> Any:
                return _packed(jnp.zeros(leaf.shape, jnp.float32), block_axis(path, leaf), signed=signed)

            return jax.tree_util.tree_map_with_path(zero, params)

        return BlockwiseState(jnp.int32(0), zeros(signed=True), zeros(signed=False))

    def update(grads: Params, state: BlockwiseState, params: Params | None = None) -> tuple[Params, BlockwiseState]:
        del params
        count = optax.safe_increment(state.count)

        def one(path: tuple, grad: jax.Array, first: Any, second: Any) -> tuple[jax.Array, Any, Any]:
            if grad.size > AT_ONCE and grad.ndim > own_axes(path[-1].key):
                return jax.lax.map(lambda layer: one(path, *layer), (grad, first, second))
            axis, grad = block_axis(path, grad), grad.astype(jnp.float32)
            mu = b1 * _unpacked(first, axis, signed=True) + (1 - b1) * grad
            nu = b2 * _unpacked(second, axis, signed=False) + (1 - b2) * grad**2
            step = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            return step, _packed(mu, axis, signed=True), _packed(nu, axis, signed=False)

        leaves, structure = jax.tree_util.tree_flatten_with_path(grads)
        moments = zip(*map(structure.flatten_up_to, (state.mu, state.nu)), strict=True)
        found = [one(path, grad, *both) for (path, grad), both in zip(leaves, moments, strict=True)]
        steps, mu, nu = (structure.unflatten([each[part] for each in found]) for part in range(3))
        return steps, BlockwiseState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def block_axis(path: tuple, leaf: jax.Array) -> int | None:
    """The axis along which a weight's blocks lie, counted from the end: its longest, of a single layer's axes.

    None: a single layer's has fewer than `LEAST` elements and is not packed.
    """
    shape = leaf.shape[-own_axes(path[-1].key) :]
    if math.prod(shape) < LEAST:
        return None
    return max(range(-1, -len(shape) - 1, -1), key=lambda axis: shape[axis])


def _packed(values: jax.Array, axis: int | None, *, signed: bool) -> Any:
    """`Blocks` of the values with the nearest codes; the values themselves if there is no axis."""
    if axis is None:
        return values
    axis += values.ndim
    length = values.shape[axis]
    padding = [(0, -length % BLOCK if place == axis else 0) for place in range(values.ndim)]
    padded = jnp.pad(values, padding)
    blocks = padded.reshape(*values.shape[:axis], -1, BLOCK, *values.shape[axis + 1 :])
    absmax = jnp.max(jnp.abs(blocks), axis=axis + 1)
    scaled = blocks / jnp.expand_dims(jnp.where(absmax == 0, 1, absmax), axis + 1)
    codes = nearest_codes(scaled, signed=signed).reshape(padded.shape)
    return Blocks(jax.lax.slice_in_dim(codes, 0, length, axis=axis), absmax)


def _unpacked(moment: Any, axis: int | None, *, signed: bool) -> jax.Array:
    if axis is None:
        return moment
    axis += moment.codes.ndim
    absmax = jnp.repeat(moment.absmax, BLOCK, axis=axis)
    absmax = jax.lax.slice_in_dim(absmax, 0, moment.codes.shape[axis], axis=axis)
    return lookup(moment.codes, dynamic_map(signed)) * absmax


def nearest_codes(scaled: Float[Array, "*shape"], *, signed: bool) -> UInt8[Array, "*shape"]:
    """The codes of the values of `dynamic_map` nearest to these, from -1 (or 0) to 1; in the middle the lower one.

    The map's decades are cut into equal cells, twice as many in each next one. That gives a code which is off by one at
    most, and the borders beside it settle which. Searching among all borders would hold several integers for each
    value; this is one loop over the values.
    """
    levels = dynamic_map(signed)
    borders = (levels[:-1] + levels[1:]) * np.float32(0.5)
    size, first = jnp.abs(scaled), 1 if signed else 2
    decade = sum((size > 10.0**exponent).astype(jnp.int32) for exponent in range(-6, 0))
    cells = jnp.left_shift(first, decade)
    part = (size * lookup(decade, 10.0 ** np.arange(6, -1, -1, dtype=np.float32)) - 0.1) / 0.9
    rank = cells - first + jnp.clip((part * cells).astype(jnp.int32), 0, cells - 1)
    zero = 127 if signed else 0
    code = jnp.where(scaled < 0, zero - 1 - rank, zero + 1 + rank)
    above = scaled > lookup(code, np.append(borders, np.float32(np.inf)))
    below = scaled <= lookup(code, np.append(np.float32(-np.inf), borders))
    return (code + above - below).astype(jnp.uint8)
