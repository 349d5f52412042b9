"""A batch's tokens in chunks, so that only one chunk's logits exist at a time, and none for chunks without weight."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora import sharding
from jlora.types import Params

Project = Callable[[Params, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A batch's tokens for a loop over chunks of `columns` tokens of every row.

    If that saves a chunk, every row's counted tokens (those of nonzero weight) are moved to its front; else all stay in
    place. On a mesh that splits a row's tokens, each part is a row of its own, so that no token leaves its device. In
    shapes, S counts these rows, and N is their length, padded to whole chunks.

    Attributes:
        weights: [S, N], in this order.
        count: how many chunks to compute, so that they hold every counted token.
        order: int32 [S, T/parts], the token that goes to each place in front.
        places: int32 [S, T/parts], the place in front that each counted token goes to.
        counted: bool [S, T/parts], whether a token counts.
        moved: whether counted tokens are moved to the front.
        parts: how many parts a row is split into.
        columns: tokens of every row in a chunk.
        rows, vocabulary: the mesh axes of logits.
    """

    weights: jax.Array
    count: jax.Array
    order: jax.Array
    places: jax.Array
    counted: jax.Array
    moved: jax.Array | bool
    parts: int
    columns: int
    rows: tuple[str, ...]
    vocabulary: tuple[str, ...]

    @classmethod
    def of(
        cls, project: Project, head: Params, hidden: jax.Array, weights: Float[Array, "B T"], chunk: int
    ) -> "Chunks":
        """Chunks for which a device computes the logits of about `chunk` tokens.

        If it has only a part of the vocabulary, they are more tokens, but as many numbers.
        """
        logits = jax.eval_shape(project, head, hidden[:, :1])
        rows, vocabulary = sharding.logits_axes(logits.shape[-1])
        parts = sharding.ways(sharding.TOKENS)
        parts = parts if weights.shape[1] % parts == 0 else 1
        weights = _by_part(weights, parts)
        height, width = weights.shape
        columns = max(1, min(width, chunk * parts * sharding.ways(*rows, *vocabulary) // height))
        counted = weights != 0
        found = jnp.cumsum(counted, axis=1, dtype=jnp.int32)
        place = jax.lax.broadcasted_iota(jnp.int32, counted.shape, 1)
        in_front = -(-jnp.max(found[:, -1]) // columns)
        in_place = -(-jnp.max(jnp.where(counted, place + 1, 0)) // columns)
        moved = in_front < in_place if columns < width else False
        # Searched, not sorted: XLA takes long to compile a sort for a TPU.
        order = jax.vmap(jnp.searchsorted)(found, place + 1).astype(jnp.int32) if columns < width else place
        chunks = cls(weights, in_place, order, found - 1, counted, moved, parts, columns, rows, vocabulary)
        if columns == width:
            return chunks
        front = jnp.where(place < found[:, -1:], _taken(weights, order), 0)
        weights = chunks._padded(jnp.where(moved, front, weights))
        return dataclasses.replace(chunks, weights=weights, count=jnp.minimum(in_front, in_place))

    def front(self, values: jax.Array) -> jax.Array:
        """[B, T, …] in this order, [S, N, …]; values at places of weight 0 are meaningless."""
        return self._padded(self._if_moved(lambda values: _taken(values, self.order), _by_part(values, self.parts)))

    def back(self, values: jax.Array) -> jax.Array:
        """[B, T, …] in the original order, from [S, N, …] with 0 at places of weight 0."""

        def taken(values: jax.Array) -> jax.Array:
            counted = self.counted.reshape(self.counted.shape + (1,) * (values.ndim - 2))
            return jnp.where(counted, _taken(values, self.places), 0)

        values = self._if_moved(taken, values[:, : self.order.shape[1]])
        if self.parts == 1:
            return values
        apart = values.reshape(self.parts, -1, *values.shape[1:])
        return jnp.swapaxes(apart, 0, 1).reshape(apart.shape[1], -1, *values.shape[2:])

    def chunk(self, i: jax.Array, *values: jax.Array) -> list[jax.Array]:
        """Chunk i of each array [S, N, …], on every device with the rows for which it computes a part of the logits."""
        found = [jax.lax.dynamic_slice_in_dim(each, i * self.columns, self.columns, axis=1) for each in values]
        # Constrained twice, or the compiler gathers all chunks to slice one.
        return [self._split(self._split(each, sharding.ROWS), self.rows) for each in found]

    def put(self, values: jax.Array, new: jax.Array, i: jax.Array) -> jax.Array:
        """[S, N, …] with chunk i set to `new`, which may be a sum over devices with parts of the vocabulary."""
        new = self._split(new, sharding.ROWS)
        return jax.lax.dynamic_update_slice_in_dim(values, new, i * self.columns, axis=1)

    def logits(self, project: Project, head: Params, hidden: jax.Array) -> jax.Array:
        """The logits of a chunk of hidden states."""
        return self._split(project(head, hidden), self.rows, self.vocabulary)

    def _split(self, values: jax.Array, rows: tuple[str, ...], last: tuple[str, ...] | None = None) -> jax.Array:
        between = (None,) * (values.ndim - 1)
        axes = between if last is None else (*between[1:], last)
        return sharding.constrain(values, (sharding.TOKENS, *rows), *axes)

    def _if_moved(self, move: Callable[[jax.Array], jax.Array], values: jax.Array) -> jax.Array:
        return values if self.moved is False else jax.lax.cond(self.moved, move, lambda values: values, values)

    def _padded(self, values: jax.Array) -> jax.Array:
        return jnp.pad(values, [(0, 0), (0, -values.shape[1] % self.columns)] + [(0, 0)] * (values.ndim - 2))


def target_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logit of every target. It is picked by a comparison, which stays local if V is sharded."""
    chosen = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return jnp.sum(jnp.where(chosen, logits, 0), axis=-1)


def _by_part(values: jax.Array, parts: int) -> jax.Array:
    """[parts·B, T/parts, …] of [B, T, …]."""
    if parts == 1:
        return values
    apart = jnp.swapaxes(values.reshape(values.shape[0], parts, -1, *values.shape[2:]), 0, 1)
    return apart.reshape(-1, *apart.shape[2:])


def _taken(values: jax.Array, places: jax.Array) -> jax.Array:
    places = places.reshape(places.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, places, axis=1, mode="clip")
