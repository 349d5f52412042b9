"""Sums over documents whose tokens are packed in rows, and the way back from documents to tokens.

A token's document is a number below `count`; padding has the number `count`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def by_document(values: Float[Array, "B T"], documents: Int[Array, "B T"], count: int) -> Float[Array, "{count}"]:
    """The sum of every document's values; 0 for a document without tokens."""
    return jax.ops.segment_sum(values.ravel(), documents.ravel(), count)


def to_tokens(values: Float[Array, " N"], documents: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """For every token the value of its document; 0 for padding."""
    return values.at[documents].get(mode="fill", fill_value=0)


def last_token(documents: Int[Array, "B T"], count: int) -> Bool[Array, "B T"]:
    """True at the last token of every document."""
    after = jnp.pad(documents[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return (documents < count) & (documents != after)


def rank(weights: Float[Array, "B T"], documents: Int[Array, "B T"], count: int) -> Int[Array, "B T"]:
    """1, 2, 3 … at a document's counted tokens (of nonzero weight) in order, 0 at all others."""
    counted = (weights != 0).astype(jnp.int32)
    upto = jnp.cumsum(counted, axis=1)
    before = jax.ops.segment_min((upto - counted).ravel(), documents.ravel(), count)
    return (upto - before.at[documents].get(mode="fill", fill_value=0)) * counted * (documents < count)
