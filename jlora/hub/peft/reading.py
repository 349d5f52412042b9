"""Reads PEFT adapter folders strictly: either all of an adapter fits the model, or nothing is loaded."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jlora import lora, sharding, tree
from jlora.errors import MissingFileError, UserError, number_of
from jlora.hub.checkpoints import names
from jlora.hub.checkpoints.source import locate_adapter
from jlora.hub.checkpoints.weights import (
    INDEX_SUFFIX,
    TensorInfo,
    listing,
    read_json,
    read_tensor,
    say_left_over,
    tensor_infos,
)
from jlora.hub.peft.config import CONFIG, AdapterConfig
from jlora.hub.peft.experts import exchanged
from jlora.hub.peft.names import AdapterNames
from jlora.hub.peft.single import stack_experts
from jlora.hub.peft.slots import (
    PLAIN,
    PREFIX,
    TRANSPOSED,
    Module,
    Slot,
    check_fits,
    config_slots,
    factor_slots,
    find_modules,
    is_wanted,
    optional_tensors,
    outermost,
    read_slots,
    token_modules,
)
from jlora.hub.peft.vocabulary import carried_rows
from jlora.lora.kinds import CARRIED, COPIES, TIED, changes_one_end, width
from jlora.lora.kinds.dora import BASE_NORM, MAGNITUDE
from jlora.lora.kinds.kind import DROPOUT, RANK, SCALE
from jlora.lora.kinds.product import A, B
from jlora.lora.kinds.tokens import IDS
from jlora.lora.sites import tie
from jlora.types import Params

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def load_adapter(params: Params, path: str | Path, *, peft_version: str | None = None) -> Params:
    """The params with the adapter of a PEFT folder (or Hub id) in place of any adapter they had.

    Layers that the adapter leaves out get rank 0: zero leaves, and a `lora_rank` leaf beside them.

    Args:
        peft_version: the version of PEFT that wrote the folder, if its config says another or none.

    Raises:
        FileNotFoundError: the folder or its files are missing.
        ValueError: the adapter uses features that jlora does not have, or tensors are missing, unknown or misshapen;
            all are listed.
    """
    folder = locate_adapter(path)
    config, file = open_adapter(folder)
    config = dataclasses.replace(config, peft_version=peft_version or config.peft_version)
    found = tensor_infos([file])
    base = lora.strip(params)
    leaves = tree.flatten(base)
    modules, made = find_modules(base, found), {}
    if stacked := stack_experts(file, modules, found, config, leaves):
        config, found, made = stacked
    modules = outermost(modules, found, config)
    if not stacked:
        modules = exchanged(modules, found, config, folder / CONFIG, leaves)
    adapted = [module for module in modules if is_wanted(module, found, config)]
    slots = factor_slots(adapted, config) | config_slots(leaves, config, adapted)
    mirrored = _mirrored(file, found, leaves, config)
    whole, changed = carried_rows(file, found, leaves, slots)
    check_fits(file, found, slots, optional_tensors(file, found, leaves, modules) | mirrored | whole, modules)
    base = tree.map_with_path(lambda path, leaf: _replaced(path, leaf, changed, leaves), base)
    return _marked(assemble(base, adapted, config, slots, read_slots(file, slots, made)), changed)


def open_adapter(path: str | Path) -> tuple[AdapterConfig, Path]:
    """The settings of a PEFT folder (or Hub id) and the path of its weights, which are not read.

    Raises:
        UserError: files are missing, or ask for what jlora does not have; all is listed.
    """
    folder = locate_adapter(path)
    return AdapterConfig.from_json(read_json(folder / CONFIG), folder / CONFIG), weights_file(folder)


def assemble(
    base: Params,
    adapted: list[Module],
    config: AdapterConfig,
    slots: Mapping[str, Slot],
    values: Mapping[str, np.ndarray],
) -> Params:
    """The base tree with the adapter whose tensors are `values`; layers without one get rank 0."""
    leaves = tree.flatten(base)
    new = _stacked(slots, values, leaves)
    new |= _setting_leaves(adapted, config, leaves, new)
    new |= _mark_tied(leaves, new, config)
    placed = {name: _place(name, value, leaves) for name, value in new.items()}
    return tree.unflatten(_with_norms(leaves | placed))


def _replaced(path: str, leaf: Any, changed: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> Any:
    """The base's leaf, or the adapter file's values for it."""
    return _place(path, changed[path].astype(leaf.dtype), leaves) if path in changed else leaf


def _marked(params: Params, changed: Iterable[str]) -> Params:
    """The params with a mark beside every replaced leaf of the base, which tells `save_adapter` to write it."""
    leaves = tree.flatten(params)
    marks = [f"{path.rpartition('/')[0]}/{CARRIED.name}" for path in changed]
    return tree.unflatten(leaves | {path: _place(path, np.array(1, np.int32), leaves) for path in marks})


# ---------------------------------------------------------------- from tensors to leaves


def _stacked(
    slots: Mapping[str, Slot], values: Mapping[str, np.ndarray], leaves: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Path → leaf stacked from the tensors, zero-padded to the largest rank; layers without a tensor are zero."""
    by_path: dict[str, dict[int | None, np.ndarray]] = {}
    for name, slot in slots.items():
        by_path.setdefault(slot.path, {})[slot.index] = values[name]
    made = {}
    for path, layers in by_path.items():
        if None in layers:
            made[path] = layers[None]
            continue
        shape = np.max([value.shape for value in layers.values()], axis=0)
        whole = np.zeros((_layers(path, leaves), *shape), np.float32)
        for index, value in layers.items():
            whole[(index, *map(slice, value.shape))] = value
        if COPIES.holds(path.rpartition("/")[2]) and len(layers) != len(whole):
            raise UserError(
                f"{path}: trained copies of {len(layers)} of {number_of(len(whole), 'layer')}; all of a stack or none"
            )
        made[path] = whole
    return made


def _layers(path: str, leaves: Mapping[str, Any]) -> int:
    """The number of layers in the stack of the leaf at `path`."""
    module = path.rpartition("/")[0]
    return next(leaf.shape[0] for name, leaf in leaves.items() if name.rpartition("/")[0] == module)


def _setting_leaves(
    adapted: list[Module], config: AdapterConfig, leaves: Mapping[str, Any], made: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Path → leaf, for scales, ranks, dropout rates and token ids."""
    settings: dict[str, np.ndarray] = {}
    by_path: dict[str, list[Module]] = {}
    for module in adapted:
        by_path.setdefault(module.path, []).append(module)
    for path, members in by_path.items():
        stacked = members[0].index is not None
        count = members[0].site.shape[0] if stacked else 1
        scale, rank = np.zeros(count, np.float32), np.zeros(count, np.int32)
        for module in members:
            scale[module.index or 0], rank[module.index or 0] = config.scale(module.name), config.rank(module.name)
        own = {name.rpartition("/")[2]: leaf for name, leaf in made.items() if name.rpartition("/")[0] == path}
        found = {SCALE.name: scale}
        if np.any(rank != width(own)):
            found[RANK.name] = rank
        if config.lora_dropout and members[0].site.leaf == "kernel":
            found[DROPOUT.name] = np.full(count, config.lora_dropout, np.float32)
        settings |= {f"{path}/{leaf}": value if stacked else value.reshape(()) for leaf, value in found.items()}
    for module, (tokens, _) in token_modules(leaves, config, AdapterNames(leaves)).items():
        settings[f"{module}/{IDS.name}"] = np.array(tokens, np.int32)
    return settings


def _with_norms(leaves: dict[str, Any]) -> dict[str, Any]:
    """The leaves with the frozen norms that DoRA needs; layers without an adapter get them as magnitudes."""
    for path in [path for path in leaves if path.endswith(f"/{MAGNITUDE.name}")]:
        module = path.rpartition("/")[0]
        norms = jax.jit(lora.base_norms)(leaves[f"{module}/kernel"])
        leaves[f"{module}/{BASE_NORM.name}"] = norms
        if (rank := leaves.get(f"{module}/{RANK.name}")) is not None:
            leaves[path] = jnp.where(rank[..., None] > 0, leaves[path], norms)
    return leaves


def _place(path: str, value: np.ndarray, leaves: Mapping[str, Any]) -> jax.Array:
    """The leaf on the devices that hold its module."""
    module = path.rpartition("/")[0]
    siblings = [leaf for name, leaf in leaves.items() if name.rpartition("/")[0] == module]
    # A module that only the adapter has is placed like the others.
    placed = getattr(jax.tree.leaves(siblings or leaves)[0], "sharding", None)
    if isinstance(placed, NamedSharding):
        return jax.device_put(value, sharding.leaf_sharding(path, value, placed.mesh))
    return jnp.asarray(value)


# ---------------------------------------------------------------- tied embeddings


def _mirrored(
    file: Path, found: Mapping[str, TensorInfo], leaves: Mapping[str, Any], config: AdapterConfig
) -> set[str]:
    """The tensors of a tied head that repeat its embedding's, as `ensure_weight_tying` makes PEFT write them.

    Raises:
        ValueError: they differ, so one adapter cannot serve both; all are listed.
    """
    repeated, problems = set(), []
    pair = tie(leaves)
    if pair is None or not config.ensure_weight_tying or pair.leaf(leaves, pair.head):
        return repeated
    name, head = f"{PREFIX}{names.module_names(pair.embedding, 1)[0]}", f"{PREFIX}{pair.head}"
    for tensor, source, codec in (
        (f"{head}.{A.peft}", f"{name}.{B.peft_embedding}", TRANSPOSED),
        (f"{head}.{B.peft}", f"{name}.{A.peft_embedding}", TRANSPOSED),
        (f"{head}.weight", f"{name}.weight", PLAIN),
    ):
        if tensor in found and source in found:
            repeated.add(tensor)
            if not np.array_equal(read_tensor(file, tensor), codec.to_file(read_tensor(file, source))):
                problems.append(f"{tensor} is not the same as {source}, although they are tied")
    if problems:
        raise UserError(f"{file} does not fit the model; nothing was loaded:\n  " + "\n  ".join(problems))
    return repeated


def _mark_tied(leaves: Mapping[str, Any], made: Mapping[str, Any], config: AdapterConfig) -> dict[str, np.ndarray]:
    pair = tie(leaves)
    beside = leaves | dict(made)
    if pair is None or not (pair.tied and config.ensure_weight_tying and changes_one_end(beside, pair.embedding)):
        return {}
    return {f"{pair.embedding}/{TIED.name}": np.array(1, np.int32)}


def weights_file(folder: Path) -> Path:
    """The file that holds the adapter's tensors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a pickle, or split over several files.
    """
    if (folder / WEIGHTS).is_file():
        say_left_over(folder, WEIGHTS)
        return folder / WEIGHTS
    if (folder / f"{WEIGHTS}{INDEX_SUFFIX}").is_file():
        raise UserError(f"{folder} holds its adapter in several files; save it with PEFT, which writes one {WEIGHTS}")
    if (folder / PICKLE).is_file():
        raise UserError(
            f"{folder} has only {PICKLE}, a pickle, which runs code when opened, so jlora does not read it; "
            f"load it with PEFT and save it again: save_pretrained writes {WEIGHTS}"
        )
    raise MissingFileError(f"no {WEIGHTS} in {folder}; files there: {listing(folder)}")
