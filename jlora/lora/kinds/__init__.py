"""What an adapter consists of: one file a kind, and the one table that everything else walks.

Every kind says how it is wanted, started, applied and merged, and under what names PEFT's files hold it. To add one,
write its file and its row here; `tests/lora/kinds/test_kinds.py` then holds it to the law that all kinds keep,
linear(x, module) == x @ merge(module).
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jlora.errors import UserError, raise_all
from jlora.lora.kinds.banked import IDS, WEIGHTS
from jlora.lora.kinds.bias import BIAS
from jlora.lora.kinds.copies import COPIES, describe, original
from jlora.lora.kinds.dora import DORA
from jlora.lora.kinds.kind import Kind, Leaf
from jlora.lora.kinds.miss import MISS
from jlora.lora.kinds.product import PRODUCT, TIED
from jlora.lora.kinds.tokens import TOKENS
from jlora.tree import STACKED_AXES

if TYPE_CHECKING:
    from jlora.lora.config import LoraConfig

# In the order in which they act on a weight, and on an output.
KINDS: tuple[Kind, ...] = (COPIES, PRODUCT, MISS, DORA, TOKENS, BIAS)
# This embedding or head is not the base's: the adapter's file holds it whole (`jlora.hub.peft`).
CARRIED = Leaf("lora_carried")
# PEFT's types of adapter.
TYPES = tuple(kind.peft_type for kind in KINDS if kind.peft_type and not kind.peft_field)
LEAVES = {leaf.name: leaf for leaf in (*(leaf for kind in KINDS for leaf in kind.leaves), TIED, CARRIED, IDS, WEIGHTS)}


def update_of(peft_type: Any) -> Kind | None:
    """The kind that adapters of one of PEFT's types add to weights; None if jlora does not have the type."""
    return next((kind for kind in KINDS if kind.peft_type == peft_type and not kind.peft_field), None)


def check(config: "LoraConfig") -> None:
    """Raises UserError if a config asks for an unknown type of adapter, or for kinds that do not go together.

    All faults are listed.
    """
    if update_of(config.peft_type) is None:
        raise UserError(f"peft_type={config.peft_type!r}: expected one of {', '.join(TYPES)}")
    raise_all(
        f"{kind.peft_field} goes with peft_type={kind.peft_type!r}, not {config.peft_type!r}"
        for kind in KINDS
        if kind.wanted(config) and kind.peft_type not in ("", config.peft_type)
    )


def width(module: Mapping[str, Any]) -> int:
    """The widest rank that the leaves of a module's update have room for."""
    leaf = next(leaf for leaf in LEAVES.values() if leaf.name in module and leaf.trained and leaf.is_factor)
    axis = next(axis for axis in ("rank", "shard") if axis in leaf.axes)
    return module[leaf.name].shape[leaf.axes.index(axis) - len(leaf.axes)]


def leaf_of(name: str) -> Leaf | None:
    """What is known of an adapter's leaf by its name; None for a leaf of the base."""
    return describe(name) if COPIES.holds(name) else LEAVES.get(name)


def own_axes(name: str) -> int:
    """How many axes a trained leaf of this name has in a single layer; those before are of stacks and experts."""
    leaf = leaf_of(name)
    return len(leaf.axes) if leaf and leaf.axes else STACKED_AXES.get(original(name), 2) - 1


def multiplies(name: str) -> bool:
    """Whether a leaf of this name, the base's or an adapter's, may take part in a matrix product."""
    leaf = leaf_of(name)
    return leaf is None or COPIES.holds(name) or leaf.is_factor


def changed_leaves(module: Mapping[str, Any]) -> set[str]:
    """The names of the leaves that a module's adapter changes, including leaves that only the adapter has."""
    return {name for kind in KINDS for name in kind.changes(module)}


def changes_one_end(leaves: Mapping[str, Any], embedding: str) -> bool:
    """Whether adapters change the embedding, and would not act in a head that shares its weight unless marked so."""
    start = f"{embedding}/"
    inside = {path.removeprefix(start): leaf for path, leaf in leaves.items() if path.startswith(start)}
    return any("embedding" in kind.changes(inside) for kind in KINDS if kind.marked)


def kinds_in(module: Mapping[str, Any]) -> tuple[Kind, ...]:
    """The kinds of which the module has trained leaves."""
    return tuple(kind for kind in KINDS if kind.is_in(module))


def not_held(leaves: Mapping[str, Any], holds: Iterable[Kind]) -> dict[str, str]:
    """Path → title of its kind, for each adapter's leaf that a format which holds only these kinds cannot hold."""
    others = [kind for kind in KINDS if kind not in holds]
    trained = [path for path in leaves if (leaf := leaf_of(path.rpartition("/")[2])) and leaf.trained]
    return {path: kind.title for kind in others for path in trained if kind.holds(path.rpartition("/")[2])}
