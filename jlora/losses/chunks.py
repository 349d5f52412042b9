"""Counted tokens moved to the front of every row, so that only chunks that hold one are projected to the vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The order of a batch's tokens for a loop over chunks of `columns` tokens of every row.

    Attributes:
        order: int32 [B, T], the token that each place takes.
        columns: of a chunk; rows are padded to a multiple of it.
    """

    order: jax.Array
    columns: int

    @classmethod
    def of(cls, weights: Float[Array, "B T"], chunk: int) -> "Chunks":
        """The order that puts tokens of weight 0 last, and chunks of about `chunk` tokens."""
        columns = max(1, min(weights.shape[1], chunk // weights.shape[0]))
        return cls(jnp.argsort(weights == 0, axis=1, stable=True), columns)

    def front(self, values: jax.Array) -> jax.Array:
        """[B, T, …] in this order, padded with zeros to whole chunks."""
        order = self.order.reshape(self.order.shape + (1,) * (values.ndim - 2))
        moved = jnp.take_along_axis(values, order, axis=1)
        return jnp.pad(moved, [(0, 0), (0, -values.shape[1] % self.columns)] + [(0, 0)] * (values.ndim - 2))

    def back(self, values: jax.Array) -> jax.Array:
        """[B, T] as they were, from what `front` made of them."""
        return jnp.take_along_axis(values[:, : self.order.shape[1]], jnp.argsort(self.order, axis=1), axis=1)


def columns_of(values: jax.Array, i: jax.Array, columns: int) -> jax.Array:
    """Chunk i of [B, T, …]."""
    return jax.lax.dynamic_slice_in_dim(values, i * columns, columns, axis=1)


def count(weights: jax.Array, columns: int) -> jax.Array:
    """How many chunks hold a counted token, of weights that are in front order."""
    return -(-jnp.max(jnp.sum(weights != 0, axis=1)) // columns)


def target_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logit of every target. A compare picks it: it stays local on a sharded V."""
    chosen = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
