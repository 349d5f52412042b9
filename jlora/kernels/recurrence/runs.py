"""Which token precedes which, where rows hold several documents: what a recurrence must know of a packed batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jlora.types import BRANCH

NONE = -2  # in `Runs.before`: nothing precedes the token
ENTRY = -1  # in `Runs.before`: the last token of an earlier call precedes it
FIRST = 1  # the run of the tokens that continue an earlier call


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["run", "starts", "trunk", "before", "branch"],
    meta_fields=["branches"],
)
@dataclasses.dataclass(frozen=True)
class Runs:
    """The tokens of each row as runs: neighbours of one segment, with or without padding between them.

    A run that starts a document starts from nothing. One that branches off a segment (`jlora.types.BRANCH`) continues
    from the end of that segment's run, its trunk, which is the last run before it that is no branch. It must be in the
    same call, or have been the last in the calls before.

    Attributes:
        run: int32 [B, T], rising from 1, which tokens that continue an earlier call have; 0 for padding.
        starts: bool [B, T], whether the token is the first of its run and does not continue an earlier call.
        trunk: int32 [B, T], the run that the token's run branches off; -1 for none.
        before: int32 [B, T], the index of the token before it in its document, or ENTRY or NONE.
        branch: bool [B, T], whether the token belongs to a branch.
        branches: whether there may be branches; without them, the arrays about them are not looked at.
    """

    run: Any
    starts: Any
    trunk: Any
    before: Any
    branch: Any
    branches: bool = False

    @classmethod
    def of(
        cls, segment_ids: Int[Array, "B T"], previous: Int[Array, "B"] | None = None, branches: bool = True
    ) -> "Runs":
        """The runs of a batch.

        Args:
            segment_ids: 0 is padding, which belongs to no run.
            previous: the segment of each row's last token in the calls before, 0 for none; default: no such calls.
            branches: whether a segment may branch off another.
        """
        batch, tokens = segment_ids.shape
        previous = jnp.zeros(batch, jnp.int32) if previous is None else previous
        real = segment_ids != 0
        branch = real & (segment_ids >= BRANCH)
        places = jnp.arange(tokens, dtype=jnp.int32)[None]
        last = _latest_before(jnp.where(real, places, -1))
        segment_before = _at(segment_ids, last, previous)
        starts = real & (segment_ids != segment_before)
        run = jnp.where(real, FIRST + jnp.cumsum(starts, axis=1, dtype=jnp.int32), 0)
        before = jnp.where(starts, NONE, last)
        trunk = jnp.full_like(run, -1)
        if branches:
            stem = _latest_before(jnp.where(real & ~branch, places, -1))
            # Its run is that of the last token before, or of one that precedes all since: runs rise with the index.
            follows = branch & (_at(segment_ids, stem, previous) == segment_ids % BRANCH)
            trunk = jnp.where(follows, _at(run, stem, jnp.full(batch, FIRST, jnp.int32)), -1)
            before = jnp.where(starts & follows, stem, before)
        return cls(run, starts, trunk, before, branch, branches)

    def padded(self, tokens: int) -> "Runs":
        """The same with padding after it, up to this many tokens."""
        room = [(0, 0), (0, tokens - self.run.shape[1])]
        fills = {"run": 0, "starts": False, "trunk": -1, "before": NONE, "branch": False}
        new = {name: jnp.pad(getattr(self, name), room, constant_values=fill) for name, fill in fills.items()}
        return dataclasses.replace(self, **new)


def last_segment(segment_ids: Int[Array, "B S"]) -> Int[Array, "B"]:
    """The segment of each row's last token that is not padding; 0 if there is none."""
    places = jnp.arange(1, segment_ids.shape[1] + 1, dtype=jnp.int32)[None]
    last = jnp.max(jnp.where(segment_ids != 0, places, 0), axis=1) - 1
    return _at(segment_ids, last[:, None], jnp.zeros(len(segment_ids), segment_ids.dtype))[:, 0]


def _latest_before(marked: jax.Array) -> jax.Array:
    """The largest value before each place of [B, T]; -1 if there is none."""
    latest = jax.lax.cummax(marked, axis=1)
    return jnp.pad(latest, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]


def _at(values: jax.Array, places: jax.Array, default: jax.Array) -> jax.Array:
    """The row's value at each place, or the row's default where the place is negative."""
    found = jnp.take_along_axis(values, jnp.maximum(places, 0), axis=1)
    return jnp.where(places < 0, default[:, None].astype(found.dtype), found)
