"""Which blocks of keys a block of queries must visit, from the marks, without an array of queries × keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora.kernels.attention.marks import Marks, is_far
from jlora.types import BRANCH

# The segments of padded queries and of padded keys: different from each other and from all real ones.
NO_QUERY, NO_KEY = -1, -2
# How much of a pair of blocks is visible.
SOME, ALL, NOTHING = range(3)


class Visits(NamedTuple):
    """For each block of one side, the other side's blocks that it is computed with.

    Attributes:
        order: int32 [B, blocks, others]: first the blocks that are partly masked, then those that are seen whole, and
            last those that are not visited.
        counts: int32 [B, blocks, 2]: how many blocks are partly masked, and how many are visited in all.
    """

    order: jax.Array
    counts: jax.Array


def visits(marks: Marks, rows: int, columns: int, by_keys: bool = False) -> Visits:
    """For every block of `rows` queries, the blocks of `columns` keys to visit; with `by_keys`, the other way round."""
    seen = _seen(marks, rows, columns)
    if by_keys:
        seen = jnp.swapaxes(seen, 1, 2)
    others = seen.shape[2]
    numbered = seen * others + jnp.arange(others, dtype=jnp.int32)[None, None]
    order = jax.lax.sort(numbered, is_stable=False) % others  # no two are equal, and a single array is sorted
    some, whole = (jnp.sum(seen == kind, axis=2, dtype=jnp.int32) for kind in (SOME, ALL))
    return Visits(order, jnp.stack([some, some + whole], axis=2))


def _seen(marks: Marks, rows: int, columns: int) -> jax.Array:
    """int32 [B, I, J]: SOME, ALL or NOTHING for each block of queries and block of keys.

    What may be seen counts as seen: the test uses only the least and greatest segment and position of a block of keys.
    """
    places, segments = _blocks(marks.positions, rows, 0), _blocks(marks.segment_ids, rows, NO_QUERY)
    key_places = _blocks(marks.key_positions, columns, 0)
    key_segments = _blocks(marks.key_segment_ids, columns, NO_KEY)
    first, last, low, high = (x[:, None] for x in (*_range(key_places), *_range(key_segments)))  # [B, 1, J]
    # A branch's tokens see two segments; for other tokens, the segment branched off is their own.
    seen, whole = jnp.bool_(False), jnp.bool_(False)
    for own in (segments, segments % BRANCH) if marks.branches else (segments,):
        seen |= (low[:, :, None] <= own[..., None]) & (own[..., None] <= high[:, :, None])
        lowest, highest = (x[..., None] for x in _range(own))  # [B, I, 1]
        whole |= (low == lowest) & (high == lowest) & (low == highest)
    seen &= places[..., None] >= first[:, :, None]
    earliest, latest = (x[..., None] for x in _range(places))
    whole &= earliest >= last
    if not is_far(marks.limit):
        seen &= places[..., None] - last[:, :, None] < marks.limit
        whole &= latest - first < marks.limit
    seen = jnp.any(seen, axis=2)
    if marks.aligned:  # later keys are not seen
        begin, end = jnp.arange(seen.shape[2]) * columns, (jnp.arange(seen.shape[1]) + 1) * rows
        seen &= (begin[None] < end[:, None])[None]
    return jnp.where(whole, ALL, jnp.where(seen, SOME, NOTHING)).astype(jnp.int32)


def _blocks(x: jax.Array, length: int, value: int) -> jax.Array:
    """[B, T] as [B, blocks, length]."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % length)], constant_values=value)
    return x.reshape(x.shape[0], -1, length)


def _range(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest of each block."""
    return jnp.min(x, axis=-1), jnp.max(x, axis=-1)
