"""How much of an adapter's update a merge keeps once the sum is rounded or packed."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import quant, tree
from jlora.errors import UserError
from jlora.lora.kinds import changed_leaves
from jlora.lora.kinds.bias import with_bias
from jlora.lora.kinds.copies import copy_of
from jlora.lora.merging import layer_of, merged_leaf, untie
from jlora.lora.partition import is_adapter
from jlora.types import Params

# A weight's path without the layers of its stack, and its layer (None outside of stacks).
Key = tuple[str, int | None]


@dataclasses.dataclass(frozen=True)
class KeptModule:
    """The update of one leaf of a module and what the merge made of it, over all of its layers.

    Attributes:
        path: the leaf's path.
        energy: ‖ΔW‖² of the update.
        along: ⟨what changed, ΔW⟩.
        missed: ‖what changed - ΔW‖².
    """

    path: str
    energy: float
    along: float
    missed: float


@dataclasses.dataclass(frozen=True)
class Kept:
    """How much of every leaf's update a merge kept; as text, a table with a row for each leaf."""

    modules: tuple[KeptModule, ...]

    @property
    def fraction(self) -> float:
        """⟨what changed, ΔW⟩ / ‖ΔW‖²: 1 where the merge keeps the whole update, 0 where rounding erases it."""
        energy = sum(module.energy for module in self.modules)
        return sum(module.along for module in self.modules) / energy if energy else 1.0

    @property
    def error(self) -> float:
        """‖what changed - ΔW‖ / ‖ΔW‖: the part of the update that the merge loses, and the noise that rounding adds."""
        energy = sum(module.energy for module in self.modules)
        return (sum(module.missed for module in self.modules) / energy) ** 0.5 if energy else 0.0

    @property
    def summary(self) -> str:
        """`fraction` and `error` in words."""
        return f"{self.fraction:.2%} of the update kept, error {self.error:.2e} of its norm"

    def __str__(self) -> str:
        width = max((len(module.path) for module in self.modules), default=0)
        lines = [self.summary]
        lines.append(f"{'weight':<{width}}  {'kept':>8}  {'error':>8}")
        for module in self.modules:
            kept, error = (
                (module.along / module.energy, (module.missed / module.energy) ** 0.5) if module.energy else (1, 0)
            )
            lines.append(f"{module.path:<{width}}  {kept:>8.2%}  {error:>8.2e}")
        return "\n".join(lines)


def kept(params: Params, merged: Params) -> Kept:
    """How much of the adapter in `params` the base tree `merged` kept, for every base leaf that the adapter changes.

    For kernels that are packed when used (`quant.Rounded`), the reference is the packed sum, which is what was trained.

    Args:
        params: a tree with an adapter.
        merged: `lora.merge(params)`, in any dtype or packing, with its layers stacked in any way.

    Raises:
        ValueError: `merged` lacks some weights, or has them in another shape; all are listed.
    """
    params, merged = untie(params), untie(merged)
    places = _places(tree.flatten(merged))
    found = []
    faults: list[str] = []
    stack_of = tree.stacks_of(tree.flatten(params))
    for path in sorted({path.rpartition("/")[0] for path in tree.flatten(params) if is_adapter(path)}):
        module = with_bias(tree.subtree(params, path))
        for name in sorted(changed_leaves(module) & module.keys()):
            leaves = {key: leaf for key, leaf in module.items() if key == name or is_adapter(key)}
            sums = np.zeros(3)
            for part, key in _parts(f"{path}/{name}", leaves, stack_of(f"{path}/{name}")):
                counterpart = _counterpart(places, key)
                if counterpart is None or counterpart.shape != part[name].shape:
                    faults.append(f"{_name(key)} {part[name].shape}: found {getattr(counterpart, 'shape', 'nothing')}")
                elif not faults:
                    sums += np.asarray(_compare(part, name, counterpart), np.float64)
            found.append(KeptModule(f"{path}/{name}", *map(float, sums)))
    if faults:
        raise UserError("the merged params have no counterparts of these weights:\n  " + "\n  ".join(faults))
    return Kept(tuple(found))


def _parts(path: str, module: Params, stack: tree.Stack | None) -> Iterator[tuple[Params, Key]]:
    """Yields (leaves, key) for every layer of the module with the leaf at `path`; once if the module is not stacked."""
    if stack is None:
        yield module, (path, None)
        return
    for number, layer in enumerate(stack.indices(module[path.rpartition("/")[2]].shape[0])):
        yield layer_of(module, number), (f"{stack.name}/{stack.rest}", layer)


def _places(flat: Mapping[str, Any]) -> dict[Key, tuple[Any, int | None]]:
    """Key → (the leaf that holds the weight, which of its layers it is)."""
    places: dict[Key, tuple[Any, int | None]] = {}
    stack_of = tree.stacks_of(flat)
    for path, leaf in flat.items():
        stack = stack_of(path)
        if stack is None:
            places[path, None] = leaf, None
        else:
            name = f"{stack.name}/{stack.rest}"
            places |= {(name, layer): (leaf, i) for i, layer in enumerate(stack.indices(leaf.shape[0]))}
    return places


def _counterpart(places: Mapping[Key, tuple[Any, int | None]], key: Key) -> Any:
    leaf, number = places.get(key, (None, None))
    return leaf if number is None else layer_of(leaf, number)


def _name(key: Key) -> str:
    return key[0] if key[1] is None else f"{key[0]} of layer {key[1]}"


@functools.partial(jax.jit, static_argnums=1)
def _compare(module: Params, name: str, merged: object) -> jax.Array:
    """(‖ΔW‖², ⟨changed, ΔW⟩, ‖changed - ΔW‖²) of one leaf of one layer's module, in float32."""
    base = _float32(module[name])
    whole = merged_leaf(module | {name: base}, name)
    if quant.packs_update(module[name]) and copy_of(name) not in module:
        whole = _float32(module[name].used(whole.astype(module[name].dtype)))
    update = whole - base
    changed = _float32(merged) - base
    return jnp.stack([jnp.sum(update**2), jnp.sum(changed * update), jnp.sum((changed - update) ** 2)])


def _float32(leaf: object) -> jax.Array:
    return jnp.asarray(quant.unpacked(leaf), jnp.float32)
