"""Which keys a query may see, as a few integers for each token, so that no form needs a mask of queries × keys."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jlora.types import BRANCH

FAR = int(np.iinfo(np.int32).max)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "segment_ids", "key_positions", "key_segment_ids", "chosen"],
    meta_fields=["windows", "branches"],
)
@dataclasses.dataclass(frozen=True)
class Marks:
    """What decides which keys a query sees: positions, segments and a window.

    A query sees the keys of its own segment, and of the one it branches off (see `BRANCH`), that are at its own
    position or less than the window earlier. If queries and keys are the same tokens, positions rise with the index
    within a segment, so that keys later in the array are never seen.

    Attributes:
        positions, segment_ids: int32 [B, T], the queries'.
        key_positions, key_segment_ids: int32 [B, S], the keys'.
        windows: the windows that layers have; None stands for no window.
        chosen: int32, the index of this layer's window in `windows`; None if there is only one.
        branches: whether some segment may branch off another, or positions within a segment may rise by anything but
            one. True if unknown.
    """

    positions: Any
    segment_ids: Any
    key_positions: Any
    key_segment_ids: Any
    chosen: Any = None
    windows: tuple[int | None, ...] = (None,)
    branches: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """(T, S)."""
        return self.positions.shape[1], self.key_positions.shape[1]

    @property
    def aligned(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.size[0] == self.size[1]

    @property
    def limit(self) -> Int[Array, ""] | int:
        """The distance at and beyond which keys are not seen."""
        limits = [FAR if window is None else window for window in self.windows]
        return limits[0] if self.chosen is None else jnp.asarray(np.array(limits, np.int32))[self.chosen]

    def among(self, windows: Sequence[int | None]) -> "Marks":
        """The marks for layers that have only these windows."""
        return dataclasses.replace(self, windows=tuple(dict.fromkeys(windows)), chosen=None)

    def of_layer(self, window: Int[Array, ""]) -> "Marks":
        """The marks of a layer with window number `window`."""
        return self if len(self.windows) == 1 else dataclasses.replace(self, chosen=window)

    def mask(self, rows: slice = slice(None), columns: slice = slice(None)) -> Bool[Array, "B T S"]:
        """Whether each of these queries sees each of these keys."""
        return seen(
            (self.positions[:, rows], self.segment_ids[:, rows]),
            (self.key_positions[:, columns], self.key_segment_ids[:, columns]),
            self.limit,
        )


def seen(
    queries: tuple[Int[Array, "B T"], Int[Array, "B T"]],
    keys: tuple[Int[Array, "B S"], Int[Array, "B S"]],
    limit: Int[Array, ""] | int,
) -> Bool[Array, "B T S"]:
    """Whether each query sees each key; both are (positions, segments)."""
    return sees(tuple(x[:, :, None] for x in queries), tuple(x[:, None, :] for x in keys), limit)


def sees(
    queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...], limit: Int[Array, ""] | int, branches: bool = True
) -> jax.Array:
    """Whether queries see keys; both are (positions, segments), as arrays that broadcast together."""
    (place, segment), (key_place, key_segment) = queries, keys
    same = segment == key_segment
    if branches:
        same |= segment % BRANCH == key_segment
    distance = place - key_place
    found = same & (distance >= 0)
    return found if is_far(limit) else found & (distance < limit)


def is_far(limit: Any) -> bool:
    """Whether the limit is known to exclude no key."""
    return isinstance(limit, int) and limit == FAR


class Scores(NamedTuple):
    """How products of queries and keys become scores.

    Attributes:
        scale: factor of the products.
        softcap: scores become softcap · tanh(scores / softcap) (Gemma 2); None leaves them as they are.
    """

    scale: float
    softcap: float | None = None

    def __call__(self, products: jax.Array) -> jax.Array:
        scores = products * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def gradient(self, scores: jax.Array, grad: jax.Array) -> jax.Array:
        """The gradient with respect to the products, from that with respect to the scores."""
        if self.softcap is not None:
            grad = grad * (1 - (scores / self.softcap) ** 2)
        return grad * self.scale


class Kept(NamedTuple):
    """What the backward pass needs: not the scores, which would be the largest residual."""

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    marks: Marks
    y: jax.Array
    log_totals: jax.Array
