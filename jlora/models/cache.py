"""The cache of what layers keep of earlier tokens, for texts that grow token by token."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora import sharding


class Shape(NamedTuple):
    """The shape of one array that a layer keeps for a row.

    Attributes:
        sizes: None stands for the room for tokens, S; an array without it is a state, which each token changes.
        dtype: None: that of the activations.
    """

    sizes: tuple[int | None, ...]
    dtype: str | None = None


Room = Mapping[str, Shape]  # what a layer keeps of a row's earlier tokens, by name
Kept = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stacks", "positions", "segment_ids", "length", "rows"],
    meta_fields=["spread"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """What layers keep of earlier tokens, with room for S tokens a row.

    Attributes:
        stacks: arrays by name, for the layers that keep the same, stacked: {"attention": {"keys": [L, B, K, S, F], …}}.
        positions, segment_ids: int32 [B, S]; segment 0 marks places that are padding or not yet written.
        length: int32, how many of the S places are written: a scalar if all rows have the same length (shorter prompts
            are padded on the left), [B] if they differ. A row must not be read once its length exceeds S.
        rows: if this is a `view`, which rows of the arrays in `stacks` its own rows are, int32 [B]. What is written to
            numbers out of range is dropped.
        spread: whether a mesh that splits the rows of a batch splits these too. If not, each device has all of them, so
            that a few can be read by number. Heads are split over `tensor` in either case, if it divides them.
    """

    stacks: Any
    positions: Any
    segment_ids: Any
    length: Any
    rows: Any = None
    spread: bool = True

    @classmethod
    def empty(
        cls, rooms: Mapping[str, tuple[int, Room]], batch: int, size: int, dtype: jax.typing.DTypeLike
    ) -> "Cache":
        """A cache with nothing written, for all rows of the same length.

        Args:
            rooms: for each stack, how many layers it has, and what one of them keeps of a row.
            size: S, the room for tokens.
            dtype: the dtype of the activations.
        """

        def zeros(layers: int, shape: Shape) -> jax.Array:
            sizes = [size if length is None else length for length in shape.sizes]
            return jnp.zeros((layers, batch, *sizes), shape.dtype or dtype)

        stacks = {
            name: {array: zeros(layers, shape) for array, shape in room.items()}
            for name, (layers, room) in rooms.items()
        }
        marks = jnp.zeros((batch, size), jnp.int32)
        return cls(stacks, marks, marks, jnp.int32(0))

    @property
    def size(self) -> int:
        """S, the room for tokens."""
        return self.positions.shape[1]

    def placed(self) -> "Cache":
        """The cache as it lies on the mesh in context, so that no program begins with moving what another one left."""
        rest = dataclasses.replace(self, stacks={})
        rest = jax.tree.map(lambda leaf: sharding.constrain(leaf, *(self._axes, None)[: leaf.ndim]), rest)
        return dataclasses.replace(rest, stacks=jax.tree.map(self._held, self.stacks))

    def mark(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> "Cache":
        """The cache with the marks of T new tokens, whose keys and values the layers then `extend` at `length`."""

        def write(marks: jax.Array, new: jax.Array) -> jax.Array:
            if self.length.ndim:
                return marks.at[self._places(new.shape[1])].set(new, mode="drop", unique_indices=True)
            return jax.lax.dynamic_update_slice(marks, new, (0, self.length))

        return dataclasses.replace(
            self, positions=write(self.positions, positions), segment_ids=write(self.segment_ids, segment_ids)
        )

    def extend(
        self, stack: str, layer: Int[Array, ""], new: Mapping[str, Float[Array, "B T K F"]]
    ) -> tuple["Cache", dict[str, Float[Array, "B S K F"]]]:
        """(the cache with a layer's values of T new tokens at `length`, its values of all tokens).

        Args:
            stack, layer: the name of the layer's stack, and its number there.
            new: arrays by name, which are kept as [B, K, S, F].
        """

        def write(kept: jax.Array, new: jax.Array) -> jax.Array:
            new = self._held(jnp.swapaxes(new.astype(kept.dtype), 1, 2)[None])
            if not self.length.ndim:
                return jax.lax.dynamic_update_slice(kept, new, (layer, 0, 0, self.length, 0))
            write = _write_one if new.shape[3] == 1 else _write_several
            return write(kept, new[0], layer, self._numbers(), self.length)

        kept = self.stacks[stack]
        kept = kept | {name: write(kept[name], array) for name, array in new.items()}
        read = {name: jnp.swapaxes(self._of_layer(kept[name], layer), 1, 2) for name in new}
        return self._with(stack, kept), read

    def state(self, stack: str, layer: Int[Array, ""]) -> Kept:
        """A layer's arrays by name, each [B, …]."""
        return {name: self._of_layer(kept, layer) for name, kept in self.stacks[stack].items()}

    def with_state(self, stack: str, layer: Int[Array, ""], state: Kept) -> "Cache":
        """The cache with these arrays [B, …] of a layer."""

        def write(kept: jax.Array, new: jax.Array) -> jax.Array:
            if self.rows is not None:
                return kept.at[layer, self.rows].set(new.astype(kept.dtype), mode="drop")
            return jax.lax.dynamic_update_index_in_dim(kept, new.astype(kept.dtype), layer, 0)

        kept = self.stacks[stack]
        return self._with(stack, kept | {name: write(kept[name], new) for name, new in state.items()})

    def view(self, rows: Int[Array, "R"], lengths: Int[Array, "R"]) -> "Cache":
        """A cache of these rows only, with these lengths, that writes to the arrays of this one; see `with_view`."""
        positions, segment_ids = (marks.at[rows].get(mode="clip") for marks in (self.positions, self.segment_ids))
        return dataclasses.replace(self, positions=positions, segment_ids=segment_ids, length=lengths, rows=rows)

    def with_view(self, view: "Cache") -> "Cache":
        """The cache with what was written to a `view` of it."""

        def put(marks: jax.Array, new: jax.Array) -> jax.Array:
            return marks.at[view.rows].set(new, mode="drop")

        return dataclasses.replace(
            self,
            stacks=view.stacks,
            positions=put(self.positions, view.positions),
            segment_ids=put(self.segment_ids, view.segment_ids),
            length=put(self.length, view.length),
        )

    def put(self, rows: Int[Array, "R"], other: "Cache") -> "Cache":
        """The cache with `rows` replaced by those of `other`, which may have less room; rows out of range are dropped.

        A cache with one length for all rows takes that of `other`, so all of its rows must be replaced at once.
        """
        room = [(0, 0), (0, self.size - other.size)]
        length = other.length
        if self.length.ndim:
            length = self.length.at[rows].set(length, mode="drop")

        def put(kept: jax.Array, new: jax.Array) -> jax.Array:
            return kept.at[:, rows, *(slice(0, size) for size in new.shape[2:])].set(new, mode="drop")

        return dataclasses.replace(
            self,
            stacks=jax.tree.map(put, self.stacks, other.stacks),
            positions=self.positions.at[rows].set(jnp.pad(other.positions, room), mode="drop"),
            segment_ids=self.segment_ids.at[rows].set(jnp.pad(other.segment_ids, room), mode="drop"),
            length=length,
        )

    def take(self, rows: Int[Array, "R"]) -> "Cache":
        """The cache with these rows of this one, which must have one length; a row may be taken several times."""
        return dataclasses.replace(
            self,
            stacks=jax.tree.map(lambda kept: kept.at[:, rows].get(mode="clip"), self.stacks),
            positions=self.positions.at[rows].get(mode="clip"),
            segment_ids=self.segment_ids.at[rows].get(mode="clip"),
        )

    def _with(self, stack: str, kept: Kept) -> "Cache":
        return dataclasses.replace(self, stacks=self.stacks | {stack: jax.tree.map(self._held, kept)})

    @property
    def _axes(self) -> tuple[str, ...]:
        """The mesh axes that split rows."""
        return sharding.ROWS if self.spread else ()

    def _held(self, kept: jax.Array) -> jax.Array:
        """Arrays [layers, B, …] of `stacks`, placed on the mesh in context."""
        heads = sharding.FEATURES if kept.ndim == 5 else None  # else it is what a convolution keeps, without heads
        return sharding.constrain(kept, None, self._axes, heads, *(None,) * (kept.ndim - 3))

    def _of_layer(self, kept: jax.Array, layer: jax.Array) -> jax.Array:
        """A layer's array, of the rows of a view."""
        if self.rows is None:
            return jax.lax.dynamic_index_in_dim(kept, layer, keepdims=False)
        # A slice for each row, of which a view has few: for a gather XLA's TPU compiler would copy the whole cache.
        zeros = (0,) * (kept.ndim - 2)
        shape = (1, 1, *kept.shape[2:])
        slices = [jax.lax.dynamic_slice(kept, (layer, row, *zeros), shape) for row in self.rows]
        return self._held(jnp.concatenate(slices, axis=1))[0]

    def _numbers(self) -> Int[Array, "B"]:
        """Which rows of the arrays in `stacks` are this cache's; a view has these in common with others."""
        return jnp.arange(len(self.length), dtype=jnp.int32) if self.rows is None else self.rows

    def _places(self, tokens: int) -> tuple[jax.Array, jax.Array]:
        """(rows [B, 1], columns [B, T]) of every row's next tokens in the marks, which also a view has to itself."""
        rows = jnp.arange(len(self.length), dtype=jnp.int32)[:, None]
        return rows, self.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]


def _write_one(kept: jax.Array, new: jax.Array, layer: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """`kept` [L, B, K, S, F] with a token's values [R, K, 1, F] in a column of each row, none in a column beyond S."""
    # Were the heads K a part of what is written at once, XLA's TPU compiler would lay them beside F, and copy the whole
    # cache to that layout and back. Were they not paired with the cache's, a mesh that splits them would gather them.
    shape = new.shape[0], new.shape[1]
    index = jnp.stack([jnp.broadcast_to(part, shape) for part in (layer, rows[:, None], columns[:, None])], axis=-1)
    pairs = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,),
        inserted_window_dims=(0, 1, 3),
        scatter_dims_to_operand_dims=(0, 1, 3),
        operand_batching_dims=(2,),
        scatter_indices_batching_dims=(1,),
    )
    return jax.lax.scatter(kept, index, new[:, :, 0], pairs, unique_indices=True, mode="drop")


def _write_several(kept: jax.Array, new: jax.Array, layer: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The same for several tokens' values [R, K, T, F], from a column of each row on."""
    # A slice for each row: a scatter of several tokens, or a loop, would again copy the whole cache.
    count, size = kept.shape[1], kept.shape[3]
    new = new[:, :, :size]
    _, heads, tokens, width = new.shape
    padded = jnp.pad(new, ((0, 0), (0, 0), (tokens, 0), (0, 0)))
    for number in range(len(new)):
        row, column = rows[number], columns[number]
        first = jnp.minimum(column, size - tokens)  # a slice that would pass the end begins earlier
        before = jnp.minimum(column - first, tokens)
        place = (layer, row, 0, first, 0)
        old = jax.lax.dynamic_slice(kept, place, (1, 1, heads, tokens, width))
        own = jax.lax.dynamic_slice(padded[number], (0, tokens - before, 0), (heads, tokens, width))
        is_new = (jnp.arange(tokens) >= before) & (row < count)
        kept = jax.lax.dynamic_update_slice(kept, jnp.where(is_new[:, None], own, old), place)
    return kept
