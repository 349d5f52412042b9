"""Which mesh axes split which dimensions of a leaf.

One table of path rules for the base, its packed forms and its adapters, in every family.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import tree
from jlora.families import called, every
from jlora.sharding.mesh import FEATURES, WEIGHTS

Sizes = Mapping[str, int]

# Axes of the last two dimensions (input, output) of a kernel. Column-parallel linears split their outputs over
# `tensor`, row-parallel ones their inputs, so tensor parallelism costs only one all-reduce a block (Megatron-LM, 2019).
# What `fsdp` splits is gathered where it is used (`jlora.sharding.gathered`).
COLUMN = (WEIGHTS, FEATURES)
ROW = (FEATURES, WEIGHTS)
# The narrow factor's dimension that `tensor` splits: fsdp splits it further.
BOTH = (FEATURES, WEIGHTS)
# A vocabulary is never gathered: hidden states, which are far smaller, go to the part of the head that a device has.
VOCABULARY = "vocabulary"
MEANT = {VOCABULARY: BOTH}


def _modules(*parts: str) -> str:
    """A pattern for these parts of any family, wherever they are."""
    return rf"(.*/)?({'|'.join(called(*parts))})"


_ROW_PARALLEL = rf"(.*/)?({'|'.join(every(lambda family: family.names.row_parallel))})"
_LATENTS = rf"(.*/)?({'|'.join(every(lambda family: family.names.latents))})"
_HEAD, _EMBEDDING, _POSITIONS = _modules("head"), _modules("embedding"), _modules("positions")

Axes = tuple[str | tuple[str, ...] | None, ...]

RULES: tuple[tuple[str, Axes], ...] = (
    (rf"{_HEAD}/(trained_)?kernel", (None, VOCABULARY)),
    (rf"{_HEAD}/lora_(start_)?b", (None, VOCABULARY)),
    (rf"{_HEAD}/lora_(start_)?a", ()),
    (rf"{_POSITIONS}/.*", ()),  # there are few positions
    (r"(.*/)?(trained_)?embedding", (VOCABULARY, None)),
    (rf"{_EMBEDDING}/lora_(start_)?a", (VOCABULARY, None)),
    (rf"{_EMBEDDING}/lora_(start_)?b", ()),
    (rf"{_ROW_PARALLEL}/(trained_)?kernel", ROW),
    (rf"{_ROW_PARALLEL}/lora_(start_)?a", (BOTH, None)),
    (rf"{_ROW_PARALLEL}/lora_(start_)?b", (None, WEIGHTS)),
    (rf"{_LATENTS}/(trained_)?kernel", (WEIGHTS, None)),
    (rf"{_LATENTS}/lora_(start_)?b", (None, WEIGHTS)),
    (r"(.*/)?(trained_)?kernel", COLUMN),
    (r"(.*/)?lora_(start_)?a", (WEIGHTS, None)),
    (r"(.*/)?lora_(start_)?b", (None, BOTH)),
    (r".*", ()),
)


def leaf_sharding(path: str, leaf: Any, mesh: Mesh) -> Any:
    """NamedShardings in the structure of `leaf`: an array, a ShapeDtypeStruct, or a packed value with several parts."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), leaf_specs(path, leaf, mesh.shape))


def leaf_specs(path: str, leaf: Any, sizes: Sizes) -> Any:
    """PartitionSpecs in the structure of `leaf`, on a mesh whose axes have these sizes.

    The rule names axes for the trailing dimensions. The parts of a packed value that have its rank (codes, block
    scales) are all split in the same way, so that blocks stay whole. A part's dimension with a single entry (a scale
    for all inputs) is not split, and parts of another rank (nested scales), which are tiny, are replicated. An axis
    that does not divide a dimension of every part that is split is left out; but fsdp, which does not matter to the
    product, then splits the rule's other dimension if it divides that one.
    """
    axes = tree.match_rules(RULES, [path], allow_unused=True)[path]
    parts = [part for part in jax.tree.leaves(leaf) if part.ndim == leaf.ndim]
    offset = leaf.ndim - len(axes)
    wanted = {i: _names(axis) for i, axis in enumerate(axes, start=offset) if axis is not None and i >= 0}
    lengths = {i: [part.shape[i] for part in parts if part.shape[i] > 1] for i in wanted}
    flattened = bool(wanted) and parts[0].shape[-1] != leaf.shape[-1]  # a kernel packed as one column
    spec: list[tuple[str, ...]] = [()] * leaf.ndim
    # fsdp comes last: what remains when it is gathered must be contiguous.
    given = ((i, name) for i, names in wanted.items() for name in names)
    for i, name in sorted(given, key=lambda at: at[1] == WEIGHTS):
        elsewhere = [other for other in wanted if other != i] if name == WEIGHTS else []
        for at in [] if flattened and name == FEATURES else [i, *elsewhere]:
            ways = math.prod(sizes[each] for each in (*spec[at], name))
            if lengths[at] and all(size % ways == 0 for size in lengths[at]):
                spec[at] = (*spec[at], name)
                break

    def place_part(part: Any) -> PartitionSpec:
        if part.ndim != leaf.ndim:
            return PartitionSpec()
        kept = [names if size > 1 else () for names, size in zip(spec, part.shape, strict=True)]
        return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in kept))

    return jax.tree.map(place_part, leaf)


def features(module: str) -> tuple[str | None, str | None]:
    """The mesh axes that split the inputs and the outputs of the linear at this path while it computes."""
    axes = tree.match_rules(RULES, [f"{module}/kernel"], allow_unused=True)[f"{module}/kernel"]
    return tuple(axis if axis == FEATURES else None for axis in axes)


def tree_shardings(params: dict, mesh: Mesh) -> dict:
    """The shardings of a whole tree, leaf by leaf."""
    return tree.map_with_path(lambda path, leaf: leaf_sharding(path, leaf, mesh), params)


def shard(params: dict, mesh: Mesh) -> dict:
    """The params, placed on the mesh by `tree_shardings`."""
    return jax.device_put(params, tree_shardings(params, mesh))


def _names(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    return MEANT.get(axis, (axis,)) if isinstance(axis, str) else axis
