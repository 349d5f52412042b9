"""Merging adapters into their base leaves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlora import quant, tree
from jlora.errors import UserError
from jlora.lora.kinds import KINDS, TIED, TOKENS, changed_leaves, changes_one_end
from jlora.lora.kinds.bias import with_bias
from jlora.lora.kinds.copies import copy_of
from jlora.lora.kinds.kind import SCALE
from jlora.lora.kinds.tokens import replaced_rows
from jlora.lora.partition import is_adapter
from jlora.lora.sites import tie
from jlora.types import Params


def merge(params: Params, dtype: jax.typing.DTypeLike | None = None) -> Params:
    """The base tree with every adapter merged in: kernel + scale · lora_a @ lora_b, in float32, rounded once.

    A packed kernel comes back dense, in the dtype it dequantises to: packing the sum again would erase small updates.
    A kernel that was trained to be packed with its update (`jlora.quant.Rounded`) comes back packed. If the adapter
    changes an embedding and its tied head differently, the merged tree has a head of its own. Leaves that only the
    adapter has become the base's: score/trained_kernel → score/kernel. A tree without adapters comes back unchanged.
    One layer's sum at a time is held in float32.

    Args:
        dtype: what to round leaves to that do not stay packed; None: each to its own dtype.
    """
    merged = tree.map_modules(functools.partial(_merge_module, dtype=dtype), untie(params))
    return tree.map_with_path(lambda _, leaf: quant.stored(leaf, dtype), merged)


def untie(params: Params) -> Params:
    """The tree, with a head of its own if its adapter changes an embedding and the tied head differently."""
    flat = tree.flatten(params)
    pair = tie(flat)
    if pair is None or not pair.tied:
        return params
    own = [name for name in flat if name.startswith(f"{pair.head}/")]
    if not own and (f"{pair.embedding}/{TIED.name}" in flat or not changes_one_end(flat, pair.embedding)):
        return params
    weight, kernel = flat[pair.weight].T, f"{pair.head}/kernel"
    extra, embedding = {kernel: weight}, tree.subtree(params, pair.embedding)
    if TOKENS.is_in(embedding) and copy_of(kernel) not in flat:
        # Not as the head's token rows: those would replace its own update, which must be added to them.
        extra[copy_of(kernel)] = replaced_rows(weight.astype(jnp.float32), embedding, rows=False)
    return tree.unflatten(flat | extra)


def merged_leaf(module: Params, name: str, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """One leaf of a module, stacked or not, with the module's adapter merged in.

    Args:
        name: the leaf's name in the module.
        dtype: what to round the float32 sum to; None: the leaf's own dtype.

    Raises:
        ValueError: the leaf is a bias that only the adapter has.
    """
    if name == "bias" and "bias" not in module:
        raise UserError("the adapter adds a bias (lora_bias) where the model has none: it cannot be merged")
    value = base = quant.unpacked(module[name])
    for kind in KINDS:
        value = kind.merged(value, name, module)
    return value.astype(dtype or base.dtype)


def layer_of(leaves: Any, number: int) -> Any:
    """One layer's part of a stack's leaves."""
    return jax.tree.map(lambda part: part[number], leaves)


def _merge_module(path: str, module: Params, dtype: jax.typing.DTypeLike | None) -> Params:
    if not any(is_adapter(name) for name in module):
        return module
    module = with_bias(module)
    base: dict[str, Any] = {name: leaf for name, leaf in module.items() if not is_adapter(name)}
    changed = changed_leaves(module)
    alone = {name: module[copy_of(name)] for name in changed - base.keys()}
    # A trained copy replaces the kernel as it is; it was not packed in training either.
    rounded = quant.packs_update(base.get("kernel")) and copy_of("kernel") not in module
    merged = alone | {
        name: _merged_by_layer(module, name, None if rounded else dtype) for name in changed & base.keys()
    }
    if rounded and "kernel" in changed:
        merged["kernel"] = base["kernel"].summed(merged["kernel"])
    return base | merged


def _merged_by_layer(module: Params, name: str, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    """`merged_leaf` without float32 copies of a whole stack, which are several times as large as the stack itself."""
    # Inside jit XLA makes no such copies, and a loop would be unrolled.
    scale = module.get(SCALE.name)
    if scale is None or not scale.ndim or isinstance(scale, jax.core.Tracer):
        return merged_leaf(module, name, dtype)
    count = len(scale)
    return jnp.stack([merged_leaf(layer_of(module, number), name, dtype) for number in range(count)])
