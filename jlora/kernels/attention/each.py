"""Kernels on a mesh: the compiler cannot divide them, so each device calls them for its own rows and heads."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jlora import sharding


def on_each(run: Callable, arrays: tuple) -> Any:
    """run(*arrays), computed by each device for its own rows and heads.

    Args:
        run: returns trees like `arrays`.
        arrays: trees of arrays [B, heads, …], of marks [B, T] and of scalars. The second, the keys, has the fewest
            heads.
    """
    if not sharding.sizes():
        return run(*arrays)
    count, heads = arrays[0].shape[0], arrays[1].shape[1]
    split = None if count % sharding.ways(*sharding.ROWS) else sharding.ROWS
    of_heads = sharding.split(heads, sharding.HEADS) or None

    def spec(x: Any) -> PartitionSpec:
        return PartitionSpec(*(split, *((of_heads,) if x.ndim > 2 else ()))[: x.ndim])

    in_specs, out_specs = (jax.tree.map(spec, tree) for tree in (arrays, jax.eval_shape(run, *arrays)))
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)
