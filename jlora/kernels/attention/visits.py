"""Which blocks of keys a block of queries has to look at, from the marks: no array of queries × keys is made."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora.kernels.attention.marks import Marks, is_far
from jlora.types import BRANCH

# Segments of what is padded: those of no query, of no key, and not each other's.
NO_QUERY, NO_KEY = -1, -2
# How much of a pair of blocks is seen.
SOME, ALL, NOTHING = range(3)


class Visits(NamedTuple):
    """The other side's blocks that each block of one side is to be computed with.

    Attributes:
        order: int32 [B, blocks, others]: first those of which a mask leaves a part, then those that are seen whole, and
            last those that are not to be looked at.
        counts: int32 [B, blocks, 2]: of the first, and of the first and second together.
    """

    order: jax.Array
    counts: jax.Array


def visits(marks: Marks, rows: int, columns: int, by_keys: bool = False) -> Visits:
    """Of every block of `rows` queries, the blocks of `columns` keys; `by_keys`, the other way round."""
    seen = _seen(marks, rows, columns)
    if by_keys:
        seen = jnp.swapaxes(seen, 1, 2)
    others = seen.shape[2]
    numbered = seen * others + jnp.arange(others, dtype=jnp.int32)[None, None]
    order = jax.lax.sort(numbered, is_stable=False) % others  # no two are equal, and one array is sorted alone
    some, whole = (jnp.sum(seen == kind, axis=2, dtype=jnp.int32) for kind in (SOME, ALL))
    return Visits(order, jnp.stack([some, some + whole], axis=2))


def _seen(marks: Marks, rows: int, columns: int) -> jax.Array:
    """int32 [B, I, J]: SOME, ALL or NOTHING of a block of queries and a block of keys. What may be seen counts as seen:
    of a block of keys only the least and the greatest segment and position are looked at.
    """
    places, segments = _blocks(marks.positions, rows, 0), _blocks(marks.segment_ids, rows, NO_QUERY)
    key_places = _blocks(marks.key_positions, columns, 0)
    key_segments = _blocks(marks.key_segment_ids, columns, NO_KEY)
    first, last, low, high = (x[:, None] for x in (*_range(key_places), *_range(key_segments)))  # [B, 1, J]
    # A branch's tokens see two segments; the one that is branched off is its own where there is none.
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
    if marks.aligned:  # a key that comes later is not seen
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
