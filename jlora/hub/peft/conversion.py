"""Converts PEFT's other adapters to LoRA: the best update of a given rank for each weight change, and its error."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jlora import lora, quant, tree
from jlora.hub.checkpoints.source import locate_adapter
from jlora.hub.checkpoints.weights import TensorInfo, read_json, read_tensor, tensor_infos
from jlora.hub.peft.config import CONFIG, AdapterConfig
from jlora.hub.peft.methods import Method, Shapes, Tensors, open_method
from jlora.hub.peft.reading import assemble, weights_file
from jlora.hub.peft.slots import (
    PLAIN,
    Module,
    Slot,
    check_fits,
    config_slots,
    factor_slots,
    find_modules,
    optional_tensors,
    read_slots,
)
from jlora.lora.kinds.copies import copy_of
from jlora.lora.kinds.product import A, B
from jlora.lora.low_rank import Change, Fit, Fits, best, check_rank
from jlora.types import Params


def convert_adapter(params: Params, path: str | Path, rank: int | float) -> tuple[Params, Fits]:
    """Converts a PEFT folder of (IA)³, LoHa, LoKr or VeRA to LoRA.

    Each weight change becomes its best approximation of the given rank, from its singular values (Eckart and Young
    1936), with a scale of 1. Layers that the adapter leaves out get rank 0, as with `load_adapter`. Biases that (IA)³
    scales become trained copies, exactly.

    Args:
        rank: the rank of every module, or less where a change has a lower one; or, as a float in (0, 1], the share of
            each change's squared singular values to keep, by the smallest rank that does (as in PEFT's
            `convert_to_lora`).

    Returns:
        (params with the LoRA in place of any adapter they had, report of each module's error).

    Raises:
        FileNotFoundError: the folder or its files are missing.
        ValueError: the rank or a field is invalid, or tensors are missing, unknown or misshapen; all are listed.
    """
    check_rank(rank)
    folder = locate_adapter(path)
    fields = read_json(folder / CONFIG)
    method = open_method(fields, folder / CONFIG)
    file = weights_file(folder)
    source = _open(method, file, lora.strip(params))
    factors, report = {}, []
    scales: list[np.ndarray | None] = []
    for module, tensors, change in _changes(method, source):
        left, right, energy, lost = best(change, rank)
        factors |= _file_factors(module, left, right)
        report.append(Fit(module.name, left.shape[1], energy, lost))
        scales.append(method.output_scale(module, tensors))
    biases = _biases(source, scales)
    ranks = {module.name: module.rank for module in report}
    config = _Converted(r=1, lora_alpha=1, modules_to_save=method.config.modules_to_save, ranks=ranks)
    slots = factor_slots(source.adapted, config)
    values = {name: slots[name].codec.from_file(value) for name, value in factors.items()}
    values |= read_slots(file, source.copies)
    slots |= source.copies | {path: Slot(path, None, value.shape, PLAIN) for path, value in biases.items()}
    adapted = assemble(source.base, source.adapted, config, slots, values | biases)
    return adapted, Fits(f"{fields['peft_type']} as LoRA", tuple(report))


@dataclasses.dataclass(frozen=True)
class _Converted(AdapterConfig):
    """The settings of a LoRA in which every module has its own rank and a scale of 1."""

    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def rank(self, module: str) -> int:
        return self.ranks[module]

    def scale(self, module: str) -> float:
        return 1.0


class _Source(NamedTuple):
    """A file that fits the model.

    Attributes:
        copies: the tensors of `modules_to_save`.
        shared: whole name → shape, for tensors that belong to no module.
    """

    file: Path
    base: Params
    leaves: Mapping[str, Any]
    adapted: list[Module]
    copies: Mapping[str, Slot]
    shared: Shapes


def _open(method: Method, file: Path, base: Params) -> _Source:
    """The file's tensors and their places.

    Raises:
        ValueError: the tensors do not fit the model.
    """
    found = tensor_infos([file])
    leaves = tree.flatten(base)
    modules = [module for module in find_modules(base) if module.site.leaf == "kernel" and not module.is_parameter]
    adapted = [module for module in modules if _is_wanted(module, method, found)]
    copies = config_slots(leaves, method.config, adapted)
    shared = method.shared_shapes(adapted, found)
    own = {f"{m.tensors}.{end}": shape for m in adapted for end, shape in method.shapes(m).items()}
    expected = {name: Slot("", None, shape, PLAIN) for name, shape in (own | shared).items()}
    optional = optional_tensors(file, found, leaves, find_modules(base))
    check_fits(file, found, expected | copies, optional, modules)
    return _Source(file, base, leaves, adapted, copies, shared)


def _is_wanted(module: Module, method: Method, found: Mapping[str, TensorInfo]) -> bool:
    wanted = method.config.targets(module.name)
    if wanted is None:  # left to PEFT's defaults, so the file decides
        return any(f"{module.tensors}.{end}" in found for end in method.shapes(module))
    return wanted


def _changes(method: Method, source: _Source) -> Iterator[tuple[Module, Tensors, Change]]:
    """Yields every adapted module with its tensors and its change; only one change is held at a time."""
    shared = method.shared(source.adapted, {name: _read(source.file, name) for name in source.shared})
    for module in source.adapted:
        tensors = {end: _read(source.file, f"{module.tensors}.{end}") for end in method.shapes(module)}
        weight = _weight(source.leaves, module) if method.needs_weight else None
        yield module, tensors, method.change(module, tensors, shared, weight)


def _read(file: Path, name: str) -> np.ndarray:
    return read_tensor(file, name).astype(np.float32)


def _weight(leaves: Mapping[str, Any], module: Module) -> Float[np.ndarray, "D N"]:
    """The base's weight of one layer in float32, unpacked if it is packed."""
    if module.site.tied_to:
        return np.asarray(leaves[f"{module.site.tied_to}/embedding"]).astype(np.float32).T
    weight = leaves[f"{module.path}/kernel"]
    if module.index is not None:
        weight = weight[module.index]
    dense = quant.unpacked(weight)
    return np.asarray(dense).astype(np.float32).reshape(module.site.inputs, module.site.outputs)


def _biases(source: _Source, scales: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
    """Path of a bias's trained copy → bias [L, N] or [N], times the scale of its module's output.

    If one is needed, all adapted modules with a bias get one: PEFT trains the biases of all or none.
    """
    pairs = [(m, s) for m, s in zip(source.adapted, scales, strict=True) if f"{m.path}/bias" in source.leaves]
    if all(scale is None for _, scale in pairs):
        return {}
    copies: dict[str, np.ndarray] = {}
    for module, scale in pairs:
        base = source.leaves[f"{module.path}/bias"]
        copy = copies.setdefault(copy_of(f"{module.path}/bias"), np.array(base, np.float32))
        if scale is not None:
            place = ... if module.index is None else module.index
            copy[place] *= scale.reshape(copy[place].shape)
    return copies


def _file_factors(module: Module, left: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
    """PEFT's A [R, D] and B [N, R] under the names of a LoRA of the module."""
    return {module.tensor(leaf, left.shape[1])[0]: value.T for leaf, value in ((A, left), (B, right))}
