"""Names of a tree's modules and leaves in an adapter's file, for jlora's own models and any other."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from jlora import lora, tree
from jlora.errors import UserError
from jlora.hub.checkpoints import names
from jlora.lora.kinds import COPIES
from jlora.lora.kinds.copies import original
from jlora.lora.sites import module_names


class AdapterNames:
    """Names for one tree.

    Modules of jlora's own models have transformers' names. Modules of any other Flax model have their own, with dots;
    if two would get the same name ("a.b" and "b" in "a"), they keep the slash.

    Attributes:
        stack_of: (path) → the stack that it is in, if any.
    """

    def __init__(self, leaves: Mapping[str, Any]):
        self.stack_of = tree.stacks_of(leaves)
        self._beside: dict[str, set[str]] = {}
        counts: dict[str, int] = {}
        for path, leaf in leaves.items():
            module, _, last = path.rpartition("/")
            if not lora.is_adapter(path):
                self._beside.setdefault(module, set()).add(last)
            counts.setdefault(module, leaf.shape[0] if getattr(leaf, "ndim", 0) else 1)
        self._theirs = {
            module: found for module, count in counts.items() if (found := self._transformers(module, count))
        }
        own = {module: module_names(module, count, self.stack_of) for module, count in counts.items()}
        uses = Counter(name for found in (own | self._theirs).values() for name in found)
        twice = {module for module, found in (own | self._theirs).items() if any(uses[name] > 1 for name in found)}
        self._theirs = {module: found for module, found in self._theirs.items() if module not in twice}
        self._names = own | {module: [module] for module in twice if len(own[module]) == 1} | self._theirs

    def modules(self, path: str) -> list[str]:
        """The names of the module at `path`, one per layer if it is stacked."""
        return self._names[path] if path in self._names else self._transformers(path, 1) or module_names(path, 1)

    def tensors(self, module: str, leaf: str, shape: tuple[int, ...]) -> list[names.HubTensor]:
        """The tensors that hold the leaf, one per layer (or expert) if it is stacked.

        They have transformers' names, or the module's own. Matrices are stored as torch has them, everything else as it
        is.
        """
        suffix, transposed = names.LEAVES.get(leaf, (leaf, False))
        beside = self._beside.get(module, set()) - {leaf}
        clash = any(names.LEAVES.get(other, (other,))[0] == suffix for other in beside)
        if leaf in names.LEAVES and not clash and (module in self._theirs or module not in self._names):
            return names.hub_tensors(f"{module}/{leaf}", shape)
        if clash:
            suffix, transposed = leaf, False
        stacked = self.stack_of(f"{module}/{leaf}") is not None
        own = shape[1:] if stacked else shape
        transposed = transposed and len(own) == 2
        own = own[::-1] if transposed else own
        return [
            names.HubTensor(f"{name}.{suffix}", own, transposed, (layer,) if stacked else ())
            for layer, name in enumerate(self.modules(module))
        ]

    def only(self, item: str) -> list[str]:
        """The paths of the modules whose name is `item`; if there are none, of those whose name ends in it."""
        exact = [path for path, found in self._names.items() if item in found]
        ends = [path for path, found in self._names.items() if any(name.endswith(f".{item}") for name in found)]
        return exact or ends

    def shortest(self, modules: Iterable[str]) -> list[str]:
        """The shortest name endings that match these modules and no others, by PEFT's rule for `modules_to_save`.

        Raises:
            UserError: a module's whole name is the end of another's; all are listed.
        """
        modules = set(modules)
        others = [name for path, found in self._names.items() if path not in modules for name in found]
        chosen, faults = set(), []
        for path in sorted(modules):
            last = path.rpartition("/")[2]
            items = [last] if last and not any(name.endswith(last) for name in others) else self.modules(path)
            if hit := sorted({name for name in others for item in items if name.endswith(item)}):
                faults.append(f"{path!r}: the name also means {', '.join(hit)}")
            chosen |= set(items)
        if faults:
            raise UserError(
                "PEFT's format names trained copies by how their modules' names end, and these cannot be told apart "
                "from modules that are not copied:\n  " + "\n  ".join(faults)
            )
        return sorted(chosen)

    def _transformers(self, module: str, count: int) -> list[str]:
        """transformers' names; empty for a module that it does not have, or that is only named like a stack."""
        stacked = self.stack_of(module) is not None
        if stacked != (tree.stack_of(module) is not None) or (re.fullmatch(names.EXPERTS, module) and not stacked):
            return []
        try:
            return names.module_names(module, count)
        except UserError:
            return []


def copied_modules(leaves: Iterable[str]) -> dict[str, set[str]]:
    """Module → the names of its leaves with trained copies."""
    found: dict[str, set[str]] = {}
    for path in leaves:
        module, _, name = path.rpartition("/")
        if COPIES.holds(name):
            found.setdefault(module, set()).add(original(name))
    return found
