"""Trained copies of a module's own leaves, which take their place (`modules_to_save`, `bias`)."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jlora import quant, tree
from jlora.errors import UserError
from jlora.lora.kinds.kind import Kind, Leaf, Start
from jlora.lora.matching import saves
from jlora.lora.sites import module_names, tie
from jlora.types import Params

if TYPE_CHECKING:
    from jlora.lora.config import LoraConfig

TRAINED = "trained_"


class Copies(Kind):
    """Trained copies: trained_X takes the place of leaf X.

    Where the base has no such leaf, it is the leaf itself (`score/trained_kernel`).
    """

    title = "a trained copy"

    def wanted(self, config: Any) -> bool:
        return config.bias != "none" or bool(config.modules_to_save)

    def start(self, start: Start) -> dict[str, jax.Array]:
        return _biases(start) | saved_modules(start.leaves, start.config)

    def holds(self, name: str) -> bool:
        return name.startswith(TRAINED)

    def is_in(self, module: Collection[str]) -> bool:
        return any(map(self.holds, module))

    def changes(self, module: Mapping[str, Any]) -> set[str]:
        return {original(name) for name in module if self.holds(name)}

    def merged(self, value: jax.Array, name: str, module: Params) -> jax.Array:
        return module.get(copy_of(name), value)


COPIES = Copies()


def copy_of(name: str) -> str:
    """The name, or path, of the trained copy of a leaf: score/kernel → score/trained_kernel."""
    module, slash, last = name.rpartition("/")
    return f"{module}{slash}{TRAINED}{last}"


def original(name: str) -> str:
    """The name of the leaf that a trained copy replaces."""
    return name.removeprefix(TRAINED)


def describe(name: str) -> Leaf:
    """What is known of a trained copy by its name. Biases and norms learn like B (PEFT's LoRA+) and do not decay."""
    narrow = original(name) in ("bias", "scale")
    return Leaf(name, trained=True, like_b=narrow, decays=not narrow)


def resolve(module: Params) -> Params:
    """A module's leaves as they are used: trained copies replace the leaves that they were copied from."""
    copies = {original(name): leaf for name, leaf in module.items() if name.startswith(TRAINED)}
    return {name: leaf for name, leaf in module.items() if not name.startswith(TRAINED)} | copies


def saved_modules(leaves: Mapping[str, Any], config: "LoraConfig") -> dict[str, jax.Array]:
    """The leaves of all modules selected by `modules_to_save`, unpacked and in float32, by their copies' paths.

    norm/scale → norm/trained_scale. Leaves that are not floating-point have no gradient and are not copied; nor are
    those of adapters.

    Raises:
        ValueError: no module's name ends in an item (all such are listed), or an item selects only some layers of a
            stack.
    """
    copies: dict[str, jax.Array] = {}
    used: set[str] = set()
    items = config.modules_to_save or ()
    stack_of = tree.stacks_of(leaves)
    for path, leaf in leaves.items():
        module, _, name = path.rpartition("/")
        if tree.is_added(name) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        names = module_names(module, leaf.shape[0] if leaf.ndim else 1, stack_of)
        hits = [saves([full], items) for full in names]
        if any(hits) and not all(hits):
            raise UserError(f"modules_to_save must select all layers of a stack or none; of {module} it selects some")
        if all(hits):
            copies[copy_of(path)] = quant.unpacked(leaf).astype(jnp.float32)
            used |= {item for item in items if names[0].endswith(item)}
    pair = tie(leaves)
    if pair and pair.tied and saves([pair.head], items):  # a tied head trained separately starts as the embedding
        copies[copy_of(f"{pair.head}/kernel")] = leaves[pair.weight].T.astype(jnp.float32)
        used |= {item for item in items if pair.head.endswith(item)}
    if missing := sorted(set(items) - used):
        raise UserError(f"modules_to_save: no module's name ends in {', '.join(missing)}")
    return copies


def _biases(start: Start) -> dict[str, jax.Array]:
    bias, targets = start.config.bias, {target.path: target for target in start.targets}
    if bias == "none":
        return {}
    copies = {}
    for path, leaf in start.leaves.items():
        module, _, name = path.rpartition("/")
        target = targets.get(module)
        if name != "bias" or (bias == "lora_only" and target is None):
            continue
        if bias == "lora_only" and 0 in target.ranks:
            raise UserError(
                f"bias='lora_only' needs all layers of a stack to be adapted; {module} has some that are not"
            )
        copies[copy_of(path)] = leaf.astype(jnp.float32)
    if not copies:
        raise UserError(f"bias={bias!r}: these modules have no biases")
    return copies
