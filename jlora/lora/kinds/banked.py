"""The adapters of a bank that every row of a batch uses (`jlora.lora.bank`), for the kinds that a bank holds."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jlora.errors import UserError, number_of
from jlora.lora.kinds.kind import SCALE, Leaf
from jlora.types import Params

IDS = Leaf("lora_ids")  # [B, K] of K adapters a row
WEIGHTS = Leaf("lora_weights")  # [B, K]


def is_chosen(module: Mapping[str, Any]) -> bool:
    """Whether the module's leaves are a bank's, with adapters chosen for every row."""
    return IDS.name in module


def chosen(module: Params) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """(the adapters of each row, weight · scale of each)."""
    ids = module[IDS.name]
    return ids, module[SCALE.name][ids] * module[WEIGHTS.name]


def require_chosen(module: Params, x: jax.Array) -> None:
    """Raises UserError if a bank's adapters are not chosen, or are chosen for another number of rows."""
    if is_chosen(module):
        if (rows := module[IDS.name].shape[0]) != x.shape[0]:
            raise UserError(
                f"found adapters chosen for {number_of(rows, 'row')}, and a batch of {x.shape[0]}: "
                "Bank.choose takes one choice for every row"
            )
    elif SCALE.name in module and module[SCALE.name].ndim:
        raise UserError(
            f"these are the params of a bank of {number_of(module[SCALE.name].shape[0] - 1, 'adapter')}: "
            "give the model those of Bank.choose, with a choice for every row, or of Bank.alone"
        )
