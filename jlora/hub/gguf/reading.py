"""Reads GGUF files, dequantised one tensor at a time, under the Hub's names and in its layout.

`jlora.hub.gguf.config` turns their metadata into a config.json, as the families say.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.errors import UserError
from jlora.families import FAMILIES
from jlora.families.layouts import Heads, Layout
from jlora.hub.checkpoints import names
from jlora.hub.checkpoints.weights import TensorInfo, require_finite
from jlora.hub.gguf.config import ROTARY, generation_config, read_config
from jlora.types import require


class GGUFFile:
    """A .gguf file with the config.json and the tensor names that the same model has on the Hub.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the file is damaged, or holds a model that jlora does not compute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        fields = {name: field.contents() for name, field in self._reader.fields.items() if _is_small(name)}
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
        self.config: dict[str, Any] = read_config(
            path, fields, shapes, lambda name: _dequantize(tensors[name], tensors[name].data)
        )
        self.generation_config: dict[str, Any] | None = generation_config(fields)
        self._parts = _parts(tensors, self.config["model_type"])
        known = {part.tensor.name for part in self._parts.values()} | ROTARY
        unknown = {name: Part(tensor, _shape(tensor)) for name, tensor in tensors.items() if name not in known}
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(part.shape, part.tensor.tensor_type.name, path)
            for name, part in (self._parts | unknown).items()
        }

    def rename(self, names: Mapping[str, str]) -> None:
        """Does nothing: every tensor already has the Hub's name."""

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32 and the Hub's layout.

        Raises:
            UserError: it cannot be unpacked, or holds values that are not finite.
        """
        tensor, shape, expert, layout = self._parts[name]
        values = _dequantize(tensor, tensor.data if expert is None else tensor.data[expert])
        require_finite({f"{self.path}: {tensor.name}": values})
        if layout is None:
            return values.reshape(shape)
        queries = self.config.get("num_attention_heads", 1)
        heads = Heads(queries, self.config.get("num_key_value_heads", queries))
        return np.ascontiguousarray(layout.from_gguf(values, heads)).reshape(shape)


def tokenizer_fields(path: Path) -> dict[str, Any]:
    """The file's tokenizer metadata, with "tokenizer." removed from the keys."""
    prefix, fields = "tokenizer.", _open(path).fields
    return {name.removeprefix(prefix): field.contents() for name, field in fields.items() if name.startswith(prefix)}


def _open(path: Path) -> Any:
    gguf = require("gguf", "gguf")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # errors of any class: the package trusts every count and offset in the file
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is truncated, damaged or not GGUF: {type(error).__name__}: {error}"
        ) from error


def _is_small(name: str) -> bool:
    # The vocabulary takes seconds to unpack, and only the tokenizer needs it.
    return name not in (
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",
    )


def _shape(tensor: Any) -> tuple[int, ...]:
    # GGUF lists the fastest axis first.
    return tuple(int(size) for size in tensor.shape[::-1])


def _dequantize(tensor: Any, data: np.ndarray) -> np.ndarray:
    """`data`, which is all or some rows of the tensor's data, in float32."""
    quants = require("gguf.quants", "gguf")
    try:
        return quants.dequantize(data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(f"{tensor.name} is packed as {tensor.tensor_type.name}, which gguf cannot unpack") from error


class Part(NamedTuple):
    """The place of one of the Hub's tensors in the file.

    Attributes:
        tensor: the file's tensor.
        shape: the Hub's.
        expert: its index in the tensor's first axis; None if it is the whole tensor.
        layout: the layout of its values; None if it is the Hub's.
    """

    tensor: Any
    shape: tuple[int, ...]
    expert: int | None = None
    layout: Layout | None = None


def _parts(tensors: Mapping[str, Any], model_type: str) -> dict[str, Part]:
    """The Hub's name → the tensor's place in the file."""
    parts: dict[str, Part] = {}
    for name, hub_name in names.from_gguf(tensors, model_type).items():
        tensor, shape = tensors[name], _shape(tensors[name])
        layout = FAMILIES[model_type].gguf.layout_of(name)
        if "{expert}" in hub_name:
            parts |= {hub_name.format(expert=i): Part(tensor, shape[1:], i, layout) for i in range(shape[0])}
        else:
            turned = layout is not None and layout.transposed
            parts[hub_name] = Part(tensor, shape[::-1] if turned else shape, None, layout)
    return parts
