"""Adapters whose files brought rows for tokens that the base does not have."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jlora import quant, tree
from jlora.errors import UserError, describe_faults
from jlora.lora.kinds import CARRIED
from jlora.lora.sites import tie
from jlora.types import Params


def require_same_rows(base: Params, adapters: Mapping[str, Params]) -> None:
    """Raises UserError if an adapter has an embedding or head of its own, whose rows this base does not have.

    Args:
        base: the params, which may be marked (`CARRIED`) as having rows that came with an adapter.
        adapters: trees by name, which may hold the base that each was opened on; without it only the mark tells.
    """
    beside = tree.flatten(base)
    pair = tie(beside)
    ends = [found for module in pair.modules if (found := pair.leaf(beside, module))] if pair else []
    faults: list[str] = []
    for name, adapter in adapters.items():
        flat = tree.flatten(adapter)
        for path, ours in ends:
            mark = f"{path.rpartition('/')[0]}/{CARRIED.name}"
            if path not in flat and mark in flat and mark not in beside:
                faults.append(_fault(name, path))
            theirs = flat.get(path)
            if theirs is None or ours is theirs or any(map(quant.is_packed, (ours, theirs))):
                continue
            if ours.shape != theirs.shape:
                continue  # callers report different shapes with their other faults
            if not jnp.array_equal(ours, theirs):
                faults.append(_fault(name, path))
    _refuse(faults)


def refuse_own_rows(adapters: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError if a mark among an adapter's leaves says that it has an embedding or head of its own."""
    _refuse([_fault(name, path) for name, flat in adapters.items() for path in flat if is_mark(path)])


def is_mark(path: str) -> bool:
    """Whether the leaf at `path` marks the embedding or head beside it as one that came with the adapter."""
    return path.rpartition("/")[2] == CARRIED.name


def without_marks(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's leaves without the marks, which do not affect what it computes on the base that it was opened on."""
    return {path: leaf for path, leaf in leaves.items() if not is_mark(path)}


def marks(params: Params) -> dict[str, Any]:
    """The marks in these params, by path."""
    return {path: leaf for path, leaf in tree.flatten(params).items() if is_mark(path)}


def _fault(name: str, path: str) -> str:
    return f"{name}: {path} is not the base's: its file brought rows of its own for tokens"


def _refuse(faults: list[str]) -> None:
    if faults:
        title = "adapters with rows of their own for tokens cannot be put beside others: use each alone, or merge it"
        raise UserError(describe_faults(title, faults))
