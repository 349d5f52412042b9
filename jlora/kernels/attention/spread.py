"""Attention over tokens that a mesh splits: tokens are exchanged for heads, or, failing that, keys are gathered."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jlora import sharding
from jlora.kernels.attention.marks import Marks

# The mesh axes of queries, keys and values [B, T, heads, F] when linears compute them, and during attention.
TOKENS_SPLIT = (sharding.ROWS, sharding.TOKENS, sharding.FEATURES, None)
HEADS_SPLIT = (sharding.ROWS, None, sharding.HEADS, None)

# (queries [B, T, H, F], keys and values [B, S, K, F], marks, sinks [H] or None) → the output [B, T, H, F].
Attend = Callable[[jax.Array, jax.Array, jax.Array, Marks, jax.Array | None], jax.Array]


def run(
    attend: Attend, queries: jax.Array, keys: jax.Array, values: jax.Array, marks: Marks, sinks: jax.Array | None
) -> jax.Array:
    """The result of `attend`, computed by each device for its own part.

    If tensor × sequence divides the heads, every device gets all tokens of some heads and returns the result in the
    same way (DeepSpeed-Ulysses, Jacobs et al. 2023): one all-to-all for each of the four arrays, and whole rows, which
    any form can handle. Otherwise a device keeps its own queries and gathers the keys and values of all tokens.
    """
    heads = queries.shape[2]
    if exchanges(marks, heads):
        whole = [_moved(x, TOKENS_SPLIT, HEADS_SPLIT) for x in (queries, _enough(keys, heads), _enough(values, heads))]
        marks = dataclasses.replace(
            marks, **{name: sharding.constrain(getattr(marks, name), sharding.ROWS, None) for name in OF_TOKENS}
        )
        sinks = None if sinks is None else sharding.constrain(sinks, sharding.HEADS)
        return _moved(attend(*whole, marks, sinks), HEADS_SPLIT, TOKENS_SPLIT)
    if gathers(marks, heads):
        return _gathered(attend, queries, keys, values, marks, sinks)
    return attend(queries, keys, values, marks, sinks)


OF_TOKENS = ("positions", "segment_ids", "key_positions", "key_segment_ids")


def exchanges(marks: Marks, heads: int) -> bool:
    """Whether, on the mesh in context, attention sees whole rows that are split by heads."""
    ways = sharding.ways(*sharding.HEADS)
    return ways > 1 and marks.aligned and heads % ways == 0


def gathers(marks: Marks, heads: int) -> bool:
    """Whether the mesh in context splits the queries' tokens while attention is computed."""
    ways = sharding.ways(sharding.TOKENS)
    return ways > 1 and marks.aligned and marks.size[0] % ways == 0 and not exchanges(marks, heads)


def own(marks: Marks, heads: int) -> Marks:
    """The marks that `attend` sees: if keys are gathered, shapes with fewer queries than keys."""
    if not gathers(marks, heads):
        return marks
    batch, tokens = marks.positions.shape
    queries = jax.ShapeDtypeStruct((batch, tokens // sharding.ways(sharding.TOKENS)), jnp.int32)
    return dataclasses.replace(marks, positions=queries, segment_ids=queries)


def _moved(x: jax.Array, before: tuple, after: tuple) -> jax.Array:
    """x moved from one placement to another. Both are constrained, or the compiler might move x's inputs or uses."""
    return sharding.constrain(sharding.constrain(x, *before), *after)


def _enough(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values with each head repeated, for neighbouring query heads, until the mesh divides them."""
    ways = sharding.ways(*sharding.HEADS)
    times = ways // math.gcd(x.shape[2], ways)
    return x if times == 1 else jnp.repeat(sharding.constrain(x, *TOKENS_SPLIT), times, axis=2)


def _gathered(
    attend: Attend, queries: jax.Array, keys: jax.Array, values: jax.Array, marks: Marks, sinks: jax.Array | None
) -> jax.Array:
    tokens, everywhere = PartitionSpec(None, sharding.TOKENS), PartitionSpec()
    places = dataclasses.replace(
        marks,
        positions=tokens,
        segment_ids=tokens,
        key_positions=everywhere,
        key_segment_ids=everywhere,
        chosen=None if marks.chosen is None else everywhere,
    )

    @functools.partial(
        jax.shard_map,
        in_specs=(tokens, tokens, tokens, places, None if sinks is None else everywhere),
        out_specs=tokens,
        axis_names={sharding.TOKENS},
        check_vma=False,  # kernels do not pass that check
    )
    def on_each(
        queries: jax.Array, keys: jax.Array, values: jax.Array, marks: Marks, sinks: jax.Array | None
    ) -> jax.Array:
        # In the backward pass, gradients are summed on the device that has the tokens and go to no other.
        keys, values = (jax.lax.all_gather(x, sharding.TOKENS, axis=1, tiled=True) for x in (keys, values))
        return attend(queries, keys, values, marks, sinks)

    return on_each(queries, keys, values, marks, sinks)
