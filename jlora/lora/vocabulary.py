"""Adapters that came with rows for tokens which the base does not have."""

from collections.abc import Mapping

import jax.numpy as jnp

from jlora import tree
from jlora.errors import UserError, describe_faults
from jlora.lora.merge import TIED_HEADS
from jlora.quant import is_packed
from jlora.types import Params

LEAVES = ("embedding", "kernel")  # of an embedding and of a head


def require_same_rows(base: Params, adapters: Mapping[str, Params]) -> None:
    """Raise UserError for adapters on an embedding or head of their own: on this base their tokens would be others.

    Args:
        adapters: trees that may hold the base that each was opened on, by name.
    """
    beside = tree.flatten(base)
    paths = dict.fromkeys(
        f"{module}/{leaf}" for pair in TIED_HEADS.items() for module, leaf in zip(pair, LEAVES, strict=True)
    )
    faults: list[str] = []
    for name, adapter in adapters.items():
        flat = tree.flatten(adapter)
        for path in (path for path in paths if path in flat and path in beside):
            ours, theirs = beside[path], flat[path]
            if ours is theirs or is_packed(ours) or is_packed(theirs) or ours.shape != theirs.shape:
                continue  # what does not fit in shape is said with all that does not
            if not jnp.array_equal(ours, theirs):
                faults.append(f"{name}: {path} is not the base's: its file brought rows of its own for tokens")
    if faults:
        title = "adapters with rows of their own for tokens cannot be put beside others: use each alone, or merge it"
        raise UserError(describe_faults(title, faults))
