"""An adapter from two models of one architecture: the best low-rank approximation of what training changed."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.errors import UserError
from jlora.lora.config import LoraConfig
from jlora.lora.kinds.copies import copy_of, saved_modules
from jlora.lora.low_rank import Axes, Change, Fit, Fits, as_float, best, check_rank
from jlora.lora.partition import overlay, strip
from jlora.lora.setup import ties
from jlora.lora.targets import find_targets
from jlora.types import Params


def extract(
    base: Params,
    tuned: Params,
    *,
    rank: int | float,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] | None = None,
) -> tuple[Params, Fits]:
    """(the base with an adapter that brings it as close to the tuned model as the rank allows, report).

    Each weight's change is replaced by its best approximation of `rank` (Eckart and Young 1936). Leaves that no target
    covers (norms, biases, embeddings unless targeted) stay as they are in the base and count in the report as rank 0.

    Args:
        base, tuned: two trees of one architecture, packed or not. One leaf's difference is held at a time, in float32.
        rank: the rank of every update, or a float in (0, 1]: the share of each weight's squared singular values to
            keep.
        target_modules: as in `LoraConfig`.
        modules_to_save: modules that the adapter holds whole copies of, as in `LoraConfig`.

    Raises:
        ValueError: the trees differ in more than values (all differences are listed), a pattern matches nothing, or an
            item of `modules_to_save` matches only some layers of a stack.
    """
    check_rank(rank)
    names = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    saved = tuple(modules_to_save or ())
    config = LoraConfig(r=1, target_modules=names, modules_to_save=saved or None)
    flat, changed = tree.flatten(strip(base)), tree.flatten(tuned)
    _require_same_shapes(flat, changed)
    targets = {target.path: target for target in find_targets(strip(base), config)}
    if tied := [path for path, target in targets.items() if target.site.tied_to]:
        raise UserError(f"{', '.join(tied)}: has no weight of its own, it is tied to the embedding: target that")
    found: dict[str, Any] = saved_modules(changed, config)
    fits: list[Fit] = []
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        target = targets.get(module)
        if copy_of(path) in found:
            continue
        if target is not None and target.site.leaf == name:
            difference = as_float(changed[path]) - as_float(leaf)
            factors = _factors(path.rpartition("/")[0], target, difference, rank, fits)
            found |= {f"{module}/{key}": jnp.asarray(value) for key, value in factors.items()}
        else:
            energy = float(np.sum((as_float(changed[path]) - as_float(leaf)).astype(np.float64) ** 2))
            if energy:
                fits.append(Fit(path, 0, energy, energy))
    found |= ties(flat | found)  # a tied embedding's change acts in the head too
    return overlay(strip(base), tree.unflatten(found)), Fits(f"difference at rank {rank}", tuple(fits))


def _factors(path: str, target: Any, difference: np.ndarray, rank: int | float, fits: list[Fit]) -> Params:
    """The adapter leaves of one module, for all of its layers; what each fit keeps is appended to `fits`."""
    site = target.site
    before, after = site.factor_shapes
    stack = before[: len(before) - site.axes[0]]
    axes = Axes(site.stack_shape, stack, before[len(stack) :], after)
    adapted = axes.spread(target.rank_array) > 0
    count, inputs, outputs = axes.matrices
    products = []
    for number, matrix in enumerate(difference.reshape(count, inputs, outputs)):
        name = f"{path}[{number}]" if stack else path
        if adapted[number]:
            left, right, energy, lost = best(Change(matrix), rank)
        else:
            energy = lost = float(np.sum(matrix.astype(np.float64) ** 2))
            left, right = np.zeros((inputs, 0), np.float32), np.zeros((0, outputs), np.float32)
        products.append((left, right))
        if energy:
            fits.append(Fit(name, left.shape[1], energy, lost))
    return axes.factors(products)


def _require_same_shapes(base: dict[str, Any], tuned: dict[str, Any]) -> None:
    faults = [f"{path}: only the base has it" for path in base if path not in tuned]
    faults += [f"{path}: only the tuned model has it" for path in tuned if path not in base]
    faults += [
        f"{path}: the base has {tuple(leaf.shape)}, the tuned model {tuple(tuned[path].shape)}"
        for path, leaf in base.items()
        if path in tuned and leaf.shape != tuned[path].shape
    ]
    if faults:
        raise UserError("these are not two models of one architecture:\n  " + "\n  ".join(faults))
