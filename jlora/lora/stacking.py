"""Several adapters of one base stacked along a leading axis, so that one step trains them all."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.errors import UserError
from jlora.lora.kinds import leaf_of
from jlora.lora.kinds.kind import RANK, SCALE, Leaf
from jlora.lora.kinds.product import A
from jlora.lora.partition import adapter_leaves
from jlora.lora.vocabulary import refuse_own_rows
from jlora.types import Params


def stack(adapters: Mapping[str, Params]) -> Params:
    """The leaves [K, …] of K adapters in the given order, at the widest rank, for every module that one of them adapts.

    q_proj/lora_a [L, D, 4], [L, D, 2]  →  [2, L, D, 4]

    Args:
        adapters: trees that hold adapters (params, or their `adapter_leaves`), by name.

    Raises:
        ValueError: the adapters differ in more than their ranks, their values and the modules with plain LoRA; all
            differences are listed.
    """
    leaves = {name: tree.flatten(adapter_leaves(adapter)) for name, adapter in adapters.items()}
    refuse_own_rows(leaves)
    faults: list[str] = []
    stacked = {
        path: _stacked(path, leaves, faults) for path in sorted({path for flat in leaves.values() for path in flat})
    }
    if faults:
        raise UserError("these adapters cannot be trained side by side:\n  " + "\n  ".join(faults))
    return tree.unflatten(stacked)


def unstack(stacked: Params, number: int, like: Params) -> Params:
    """The leaves of adapter `number` in a stack: those that `like` has, cut to its shapes."""
    flat = tree.flatten(stacked)

    def take(path: str, leaf: Any) -> Any:
        return flat[path][number][tuple(map(slice, leaf.shape))]

    return tree.map_with_path(take, like)


def _stacked(path: str, leaves: Mapping[str, Mapping[str, Any]], faults: list[str]) -> Any:
    held = {name: flat[path] for name, flat in leaves.items() if path in flat}
    first = next(iter(held.values()))
    shape = np.max([leaf.shape for leaf in held.values() if leaf.ndim == first.ndim], axis=0)
    faults += _differences(path, leaves, held, shape)
    if faults:
        return None
    return jnp.stack(
        [_padded(held[name], shape) if name in held else _absent(path, flat, shape) for name, flat in leaves.items()]
    )


def _differences(
    path: str, leaves: Mapping[str, Mapping[str, Any]], held: Mapping[str, Any], shape: np.ndarray
) -> list[str]:
    module, _, last = path.rpartition("/")
    leaf = leaf_of(last)
    # Along the axis of ranks factors are padded. Zeros in both A and B stay zero, since the gradient of each is a
    # product with the other.
    rank, faults = leaf.rank_axis, []
    for name, flat in leaves.items():
        if name in held:
            found = held[name].shape
            same = [a == b for i, (a, b) in enumerate(zip(found, shape, strict=False)) if i - len(shape) != rank]
            if len(found) != len(shape) or not all(same):
                faults.append(f"{name}: {path}: found {found}, others have {tuple(map(int, shape))}")
        elif not _may_lack(flat, module, leaf):
            others = ", ".join(other for other in held)
            faults.append(
                f"{name}: has no {path}, which {others} trains: give all of them this setting at the same modules, or "
                "none"
            )
    return faults


def _may_lack(flat: Mapping[str, Any], module: str, leaf: Leaf) -> bool:
    """Whether zeros (or an adapter's one rank) may stand for a leaf that an adapter lacks in this module.

    In a module that it leaves alone they have no effect and no gradient, since the scale is zero too.
    """
    left_alone = f"{module}/{SCALE.name}" not in flat
    return leaf.absent == "any" or (leaf.absent == "module" and (left_alone or leaf == RANK))


def _padded(leaf: Any, shape: np.ndarray) -> Any:
    return jnp.pad(leaf, [(0, int(full) - own) for own, full in zip(leaf.shape, shape, strict=True)])


def _absent(path: str, flat: Mapping[str, Any], shape: np.ndarray) -> Any:
    """The leaf for an adapter that lacks it: zeros, or for `lora_rank` the adapter's one rank for every layer."""
    module, _, last = path.rpartition("/")
    if last == RANK.name:
        lora_a = flat.get(f"{module}/{A.name}")
        return jnp.full(shape, 0 if lora_a is None else lora_a.shape[-1], jnp.int32)
    return jnp.zeros(shape, jnp.float32)
