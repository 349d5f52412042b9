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
    (r"(.*/)?(o_proj|down_proj)/kernel", ROW),
    (r"(.*/)?(o_proj|down_proj)/lora_a", ("tensor", None)),
    (r"(.*/)?(o_proj|down_proj)/lora_b", (None, "fsdp")),
    (r"(.*/)?embedding", ROW),
    (r"(.*/)?kernel", COLUMN),
    (r"(.*/)?lora_a", ("fsdp", None)),
    (r"(.*/)?lora_b", (None, "tensor")),
    (r".*", ()),
)


def leaf_sharding(path: str, leaf: Any, mesh: Mesh) -> Any:
    """NamedShardings in the shape of `leaf`: an array, a ShapeDtypeStruct, or a packed value made of several.

    The rule names axes for the trailing dimensions. A packed value's parts that have its rank (codes, block scales)
    are all split the same way, so blocks stay whole; parts of another rank (nested scales) are tiny and kept on every
    device. An axis that does not divide a dimension of every such part is left out.
    """
    axes = tree.match_rules(RULES, [path], allow_unused=True)[path]
    parts = [part for part in jax.tree.leaves(leaf) if part.ndim == leaf.ndim]
    offset = leaf.ndim - len(axes)
    spec: list[str | None] = [None] * leaf.ndim
    for i, axis in enumerate(axes, start=offset):
        if axis is not None and i >= 0 and all(part.shape[i] % mesh.shape[axis] == 0 for part in parts):
            spec[i] = axis
    split, whole = NamedSharding(mesh, PartitionSpec(*spec)), NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda part: split if part.ndim == leaf.ndim else whole, leaf)


def tree_shardings(params: dict, mesh: Mesh) -> dict:
    """The shardings of a whole tree, leaf by leaf."""
    return tree.map_with_path(lambda path, leaf: leaf_sharding(path, leaf, mesh), params)


def shard(params: dict, mesh: Mesh) -> dict:
    """The same params, placed on the mesh by `tree_shardings`."""
    return jax.device_put(params, tree_shardings(params, mesh))
