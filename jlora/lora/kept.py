"""What a merge keeps of an adapter's update once the sum is rounded, or packed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jlora import quant, tree
from jlora.lora.merge import MAIN, merged_leaf
from jlora.lora.partition import is_adapter
from jlora.types import Params


@dataclasses.dataclass(frozen=True)
class KeptModule:
    """One module's update and what became of it, over all of its layers.

    Attributes:
        path: of the weight.
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
    """What a merge kept of the update of every module; as text, a table with a row a module."""

    modules: tuple[KeptModule, ...]

    @property
    def fraction(self) -> float:
        """⟨what changed, ΔW⟩ / ‖ΔW‖²: 1 where the merge keeps the whole update, 0 where rounding erases it."""
        energy = sum(module.energy for module in self.modules)
        return sum(module.along for module in self.modules) / energy if energy else 1.0

    @property
    def error(self) -> float:
        """‖what changed - ΔW‖ / ‖ΔW‖: what the merge loses of the update, and what rounding adds."""
        energy = sum(module.energy for module in self.modules)
        return (sum(module.missed for module in self.modules) / energy) ** 0.5 if energy else 0.0

    def __str__(self) -> str:
        width = max((len(module.path) for module in self.modules), default=0)
        lines = [f"{self.fraction:.2%} of the update kept, error {self.error:.2e} of its norm"]
        lines.append(f"{'weight':<{width}}  {'kept':>8}  {'error':>8}")
        for module in self.modules:
            kept, error = (
                (module.along / module.energy, (module.missed / module.energy) ** 0.5) if module.energy else (1, 0)
            )
            lines.append(f"{module.path:<{width}}  {kept:>8.2%}  {error:>8.2e}")
        return "\n".join(lines)


def kept(params: Params, merged: Params) -> Kept:
    """What `merged`, a base tree, kept of the adapter in `params`: of every weight that it adds a product to.

    Args:
        merged: `lora.merge(params)`, in whatever dtype or packing.
    """
    flat = tree.flatten(merged)
    found = []
    for path in sorted({path.rpartition("/")[0] for path in tree.flatten(params) if path.endswith("/lora_a")}):
        module = tree.subtree(params, path)
        main = next((name for name in MAIN if name in module), None)
        if main is None or f"{path}/{main}" not in flat:  # of a tied head: the embedding is its weight
            continue
        sums = _compare(
            {name: leaf for name, leaf in module.items() if name == main or is_adapter(name)},
            main,
            flat[f"{path}/{main}"],
        )
        found.append(KeptModule(f"{path}/{main}", *map(float, np.asarray(sums))))
    return Kept(tuple(found))


def _compare(module: Params, main: str, merged: object) -> jax.Array:
    """(‖ΔW‖², ⟨changed, ΔW⟩, ‖changed - ΔW‖²) of one module, in float32."""
    base = _float32(module[main])
    update = merged_leaf(module | {main: base}, main) - base
    changed = _float32(merged) - base
    return jnp.stack([jnp.sum(update**2), jnp.sum(changed * update), jnp.sum((changed - update) ** 2)])


def _float32(leaf: object) -> jax.Array:
    return jnp.asarray(quant.unpacked(leaf), jnp.float32)
