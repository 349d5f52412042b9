"""Which mesh axes split which dimension of a leaf: one table of path rules for the base, its packed forms and its
adapters.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import tree

# Axes of the last two dimensions (input, output) of a kernel. Column-parallel linears split their outputs over
# `tensor`, row-parallel ones their inputs, so one all-reduce a block is all that tensor parallelism costs
# (Megatron-LM, 2019).
COLUMN = ("fsdp", "tensor")
ROW = ("tensor", "fsdp")

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(.*/)?(o_proj|down_proj)/(trained_)?kernel", ROW),
    (r"(.*/)?(o_proj|down_proj)/lora_(start_)?a", ("tensor", None)),
    (r"(.*/)?(o_proj|down_proj)/lora_(start_)?b", (None, "fsdp")),
    (r"(.*/)?(trained_)?embedding", ROW),
    (r"(.*/)?(trained_)?kernel", COLUMN),
    (r"(.*/)?lora_(start_)?a", ("fsdp", None)),
    (r"(.*/)?lora_(start_)?b", (None, "tensor")),
    (r".*", ()),
)


def leaf_sharding(path: str, leaf: Any, mesh: Mesh) -> Any:
    """NamedShardings in the shape of `leaf`: an array, a ShapeDtypeStruct, or a packed value made of several.

    The rule names axes for the trailing dimensions. A packed value's parts that have its rank (codes, block scales)
    are all split the same way, so blocks stay whole, but for a dimension of which a part has one entry only (a scale
    for all inputs): every device keeps that. Parts of another rank (nested scales) are tiny and kept on every device
    too. An axis that does not divide a dimension of every part that is split is left out.
    """
    axes = tree.match_rules(RULES, [path], allow_unused=True)[path]
    parts = [part for part in jax.tree.leaves(leaf) if part.ndim == leaf.ndim]
    offset = leaf.ndim - len(axes)
    spec: list[str | None] = [None] * leaf.ndim
    for i, axis in enumerate(axes, start=offset):
        sizes = [part.shape[i] for part in parts if part.shape[i] > 1] if i >= 0 else []
        if axis is not None and sizes and all(size % mesh.shape[axis] == 0 for size in sizes):
            spec[i] = axis

    def place(part: Any) -> NamedSharding:
        if part.ndim != leaf.ndim:
            return NamedSharding(mesh, PartitionSpec())
        kept = [axis if size > 1 else None for axis, size in zip(spec, part.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree.map(place, leaf)


def tree_shardings(params: dict, mesh: Mesh) -> dict:
    """The shardings of a whole tree, leaf by leaf."""
    return tree.map_with_path(lambda path, leaf: leaf_sharding(path, leaf, mesh), params)


def shard(params: dict, mesh: Mesh) -> dict:
    """The same params, placed on the mesh by `tree_shardings`."""
    return jax.device_put(params, tree_shardings(params, mesh))
