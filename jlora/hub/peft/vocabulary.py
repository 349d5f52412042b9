"""Whole embeddings and heads in an adapter's file, for a base that was given more rows for tokens, or other ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora import quant
from jlora.errors import UserError
from jlora.hub.checkpoints import names
from jlora.hub.checkpoints.weights import TensorInfo, read_tensor
from jlora.lora.kinds import CARRIED
from jlora.lora.kinds.tokens import ROWS
from jlora.lora.sites import tie

PREFIX = "base_model.model."
# PEFT's names of a whole embedding or head of the base: alone, under an adapter, under token rows, beside a copy.
COPIES = (".weight", ".base_layer.weight", ".token_adapter.base_layer.weight", ".original_module.weight")


def vocabulary_copies(flat: Mapping[str, Any], written: Mapping[str, Any], *, every: bool) -> dict[str, np.ndarray]:
    """The embedding and head that the adapter's file must hold whole, by PEFT's names.

    Args:
        flat: the tree's leaves.
        written: the adapter's tensors, which may hold some of these already.
        every: write both (a tied head is the embedding), as PEFT does once the vocabulary has grown; otherwise only
            those that came with the adapter.
    """
    pair, copies = tie(flat), {}
    for path in pair.modules if pair else ():
        _, leaf = pair.leaf(flat, path) or (None, None)
        if leaf is None or quant.is_packed(leaf) or not (every or f"{path}/{CARRIED.name}" in flat):
            continue
        name = _name(path)
        if f"{name}.base_layer.weight" in written:
            continue
        beside = ""
        if f"{name}.{ROWS.peft}" in written:
            beside = ".token_adapter.base_layer"
        elif f"{name}.weight" in written:  # a trained copy, which a tied head may not share
            beside = ".original_module"
        copies[f"{name}{beside}.weight"] = np.asarray(leaf if path == pair.embedding else leaf.T)
    return copies


def carried_rows(
    file: Path, found: Mapping[str, TensorInfo], leaves: Mapping[str, Any], slots: Mapping[str, Any]
) -> tuple[set[str], dict[str, np.ndarray]]:
    """(names of the file's copies of the base's embedding and head, path → values of those that differ from the base).

    As in PEFT, these replace the base's: the base that an adapter with new tokens was trained on has rows for them that
    no checkpoint holds.

    Args:
        slots: the tensors that are parts of the adapter.

    Raises:
        UserError: the copies do not have as many rows as the model, or copies of one tied matrix differ.
    """
    taken: set[str] = set()
    changed: dict[str, np.ndarray] = {}
    settled: dict[str, np.ndarray] = {}  # the file's first copy of each
    pair = tie(leaves)
    if pair is None:
        return taken, changed
    _require_same_rows(file, found, pair.modules, leaves[pair.weight].shape)
    own_head = pair.leaf(leaves, pair.head) is not None
    taken |= _repeated(file, found, *pair.modules, tied=not own_head) - slots.keys()
    for module in pair.modules:
        path = f"{pair.head}/kernel" if module == pair.head and own_head else pair.weight
        for tensor in _copies(found, module):
            # A tied head's repetition of a trained copy.
            of_trained = tensor in taken and f"{_name(pair.embedding)}.weight" in slots
            if tensor in slots or of_trained or quant.is_packed(leaves[path]):
                continue
            values = read_tensor(file, tensor).astype(np.float32)
            values = values.T if path != pair.weight else values
            if path in settled and not _close(values, settled[path]):
                raise UserError(
                    f"{file}: {tensor} differs from the embedding in the same file, and the model ties the two: "
                    "load a model whose head is its own, as the adapter was trained on"
                )
            settled[path] = values
            taken.add(tensor)
            if not _close(values, leaves[path]):
                changed[path] = values
    return taken, changed


def _repeated(file: Path, found: Mapping[str, TensorInfo], embedding: str, head: str, *, tied: bool) -> set[str]:
    """Tensors that the file repeats: trained copies, and those that a tied head shares with the embedding."""
    rows = f".{ROWS.peft}"
    pairs = [(f"{_name(head)}{rows}", f"{_name(embedding)}{rows}")] if tied else []
    pairs += [(f"{_name(head)}.weight", f"{_name(embedding)}.weight")] if tied else []
    pairs += [(f"{_name(path)}.modules_to_save.weight", f"{_name(path)}.weight") for path in (embedding, head)]
    return {
        twice
        for twice, once in pairs
        if twice in found and once in found and np.array_equal(read_tensor(file, once), read_tensor(file, twice))
    }


def _require_same_rows(
    file: Path, found: Mapping[str, TensorInfo], modules: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    rows, width = shape
    others = {
        found[tensor].shape[0]
        for module in modules
        for tensor in (*_copies(found, module), f"{_name(module)}.modules_to_save.weight")
        if tensor in found and found[tensor].shape[1:] == (width,)
    } - {rows}
    if others:
        there = max(others)
        raise UserError(
            f"{file}: the adapter was trained with {there} rows for tokens, the model has {rows}: give the model as "
            f"many with --vocab={there}, model.resize_vocab={there} in a recipe, or jlora.load(..., vocab={there})"
        )


def _copies(found: Mapping[str, TensorInfo], module: str) -> list[str]:
    return [f"{_name(module)}{copy}" for copy in COPIES if f"{_name(module)}{copy}" in found]


def _name(module: str) -> str:
    return f"{PREFIX}{names.module_names(module, 1)[0]}"


def _close(values: np.ndarray, base: Any) -> bool:
    """Whether the values are the base's, perhaps rounded."""
    return values.shape == base.shape and np.allclose(np.asarray(base, np.float32), values, rtol=0.01, atol=1e-6)
