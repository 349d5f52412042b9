"""The cache of keys and values, for texts that grow token by token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "positions", "segment_ids", "length"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of earlier tokens, stacked over layers, with room for S tokens a row.

    Attributes:
        keys, values: [L, B, K, S, F], the order in which attention reads them.
        positions, segment_ids: int32 [B, S]; segment 0 marks places that are padding or not yet written.
        length: int32, how many of the S places are written: a scalar if all rows have the same length (shorter prompts
            are padded on the left), [B] if they differ. A row must not be read once its length exceeds S.
    """

    keys: Any
    values: Any
    positions: Any
    segment_ids: Any
    length: Any

    @classmethod
    def empty(cls, layers: int, batch: int, size: int, heads: int, width: int, dtype: jax.typing.DTypeLike) -> "Cache":
        """A cache with nothing written, for all rows of the same length.

        Args:
            size: S, the room for tokens.
            heads: K, key heads.
            width: F, values of a head.
        """
        shape = (layers, batch, heads, size, width)
        marks = jnp.zeros((batch, size), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), marks, marks, jnp.int32(0))

    def mark(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> "Cache":
        """The cache with the marks of T new tokens, whose keys and values the layers then `write` at `length`."""

        def write(marks: jax.Array, new: jax.Array) -> jax.Array:
            if self.length.ndim:
                return marks.at[self._places(new.shape[1])].set(new, mode="drop", unique_indices=True)
            return jax.lax.dynamic_update_slice(marks, new, (0, self.length))

        return dataclasses.replace(
            self, positions=write(self.positions, positions), segment_ids=write(self.segment_ids, segment_ids)
        )

    def write(
        self, layer: Int[Array, ""], keys: Float[Array, "B T K F"], values: Float[Array, "B T K F"]
    ) -> tuple["Cache", Float[Array, "B S K F"], Float[Array, "B S K F"]]:
        """(the cache with a layer's new keys and values at `length`, all of that layer's keys, all of its values)."""

        def write(stack: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(stack.dtype)
            if self.length.ndim:
                rows, columns = self._places(new.shape[1])
                return stack.at[layer, rows, :, columns].set(new, mode="drop", unique_indices=True)
            new = jnp.swapaxes(new, 1, 2)[None]
            return jax.lax.dynamic_update_slice(stack, new, (layer, 0, 0, self.length, 0))

        def read(stack: jax.Array) -> jax.Array:
            return jnp.swapaxes(jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), 1, 2)

        cache = dataclasses.replace(self, keys=write(self.keys, keys), values=write(self.values, values))
        return cache, read(cache.keys), read(cache.values)

    def put(self, rows: Int[Array, "R"], other: "Cache") -> "Cache":
        """The cache with `rows` replaced by those of `other`, which may have less room; rows out of range are dropped.

        A cache with one length for all rows takes that of `other`, so all of its rows must be replaced at once.
        """
        size = other.keys.shape[3]
        room = [(0, 0), (0, self.keys.shape[3] - size)]
        length = other.length
        if self.length.ndim:
            length = self.length.at[rows].set(length, mode="drop")
        return Cache(
            self.keys.at[:, rows, :, :size].set(other.keys, mode="drop"),
            self.values.at[:, rows, :, :size].set(other.values, mode="drop"),
            self.positions.at[rows].set(jnp.pad(other.positions, room), mode="drop"),
            self.segment_ids.at[rows].set(jnp.pad(other.segment_ids, room), mode="drop"),
            length,
        )

    def take(self, rows: Int[Array, "R"]) -> "Cache":
        """The cache with these rows of this one, which must have one length; a row may be taken several times."""
        return dataclasses.replace(
            self,
            keys=self.keys.at[:, rows].get(mode="clip"),
            values=self.values.at[:, rows].get(mode="clip"),
            positions=self.positions.at[rows].get(mode="clip"),
            segment_ids=self.segment_ids.at[rows].get(mode="clip"),
        )

    def _places(self, tokens: int) -> tuple[jax.Array, jax.Array]:
        """(rows [B, 1], columns [B, T]) of every row's next tokens, if rows differ in length."""
        rows = jnp.arange(len(self.length), dtype=jnp.int32)[:, None]
        return rows, self.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]
