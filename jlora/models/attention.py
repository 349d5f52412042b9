"""Grouped-query attention with a mask that covers causality, packing, padding and the KV cache alike."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys", "values", "positions", "segment_ids", "length"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of earlier tokens, stacked over layers, with room for S tokens a row.

    Attributes:
        keys, values: [L, B, S, K, F].
        positions, segment_ids: int32 [B, S]; segment 0 marks what is padding or not written yet.
        length: int32 scalar, how many of the S are written; the same for every row (shorter prompts are padded on the left).
    """

    keys: Any
    values: Any
    positions: Any
    segment_ids: Any
    length: Any

    @classmethod
    def empty(cls, layers: int, batch: int, size: int, heads: int, width: int, dtype: jax.typing.DTypeLike) -> "Cache":
        """A cache with nothing written."""
        shape = (layers, batch, size, heads, width)
        marks = jnp.zeros((batch, size), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), marks, marks, jnp.int32(0))

    def mark(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> "Cache":
        """The cache that knows of T new tokens, whose keys and values the layers then write at `length`."""
        start = (0, self.length)
        return dataclasses.replace(
            self,
            positions=jax.lax.dynamic_update_slice(self.positions, positions, start),
            segment_ids=jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, start),
        )


def attention_mask(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segment_ids: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    """Which keys each query may see: its own segment's, at its own position or earlier."""
    same = segment_ids[:, :, None] == key_segment_ids[:, None, :]
    return same & (positions[:, :, None] >= key_positions[:, None, :])


def attend(
    queries: Float[Array, "B T H F"],
    keys: Float[Array, "B S K F"],
    values: Float[Array, "B S K F"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H F"]:
    """softmax(q·k / sqrt(F)) @ v with H/K query heads for each key head; scores and softmax in float32."""
    batch, tokens, heads, width = queries.shape
    groups = heads // keys.shape[2]
    grouped = queries.reshape(batch, tokens, keys.shape[2], groups, width)
    scores = jnp.einsum("btkgf,bskf->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * (1 / math.sqrt(width)), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgts,bskf->btkgf", weights, values).reshape(batch, tokens, heads, width)
