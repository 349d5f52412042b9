"""Reads GGUF files, dequantised one tensor at a time, under the Hub's names and in its layout.

`jlora.hub.gguf.config` turns their metadata into a config.json, as the families say.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora import models
from jlora.errors import UserError
from jlora.families import FAMILIES
from jlora.families.layouts import Joined, Layout, Sizes
from jlora.hub.checkpoints import names
from jlora.hub.checkpoints.stored import Stored
from jlora.hub.checkpoints.weights import TensorInfo, require_finite
from jlora.hub.gguf import mxfp4
from jlora.hub.gguf.config import ROTARY, generation_config, read_config, without_ahead
from jlora.hub.gguf.metadata import sizes_of
from jlora.types import require


class GGUFFile:
    """A .gguf file with the config.json and the tensor names that the same model has on the Hub.

    Attributes:
        tensors: the Hub's name → shape and type, for what can be read; GGUF's, for what has no name on the Hub.
        stored: the Hub's name → how to read it packed, for experts in MXFP4.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the file is damaged, or holds a model that jlora does not compute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        fields = {name: field.contents() for name, field in self._reader.fields.items() if _is_small(name)}
        fields, own = without_ahead(fields, [tensor.name for tensor in self._reader.tensors])
        tensors = {tensor.name: tensor for tensor in self._reader.tensors if tensor.name in own}
        shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
        self.config: dict[str, Any] = read_config(
            path, fields, shapes, lambda name: _dequantize(tensors[name], tensors[name].data)
        )
        self.generation_config: dict[str, Any] | None = generation_config(fields)
        self._parts = self._found(tensors)
        known = {tensor.name for part in self._parts.values() for tensor in part.tensors} | ROTARY
        unknown = {name: Part((tensor,), _shape(tensor)) for name, tensor in tensors.items() if name not in known}
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(part.shape, part.tensors[0].tensor_type.name, path)
            for name, part in (self._parts | unknown).items()
        }
        self.stored: dict[str, Stored] = {
            name: mxfp4.stored(part.tensors, part.joined, self.tensors[name], self._sizes)
            for name, part in self._parts.items()
            if part.joined and mxfp4.can_stay(part.tensors, part.joined)
        }

    def rename(self, names: Mapping[str, str]) -> None:
        """Does nothing: every tensor already has the Hub's name."""

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32 and the Hub's layout.

        Raises:
            UserError: it cannot be unpacked, or holds values that are not finite.
        """
        part = self._parts[name]
        values = [
            _dequantize(tensor, tensor.data if part.expert is None else tensor.data[part.expert])
            for tensor in part.tensors
        ]
        require_finite({f"{self.path}: {tensor.name}": own for tensor, own in zip(part.tensors, values, strict=True)})
        if part.joined:
            return np.ascontiguousarray(part.joined.made(values, self._sizes)).reshape(part.shape)
        if part.layout is None:
            return values[0].reshape(part.shape)
        return np.ascontiguousarray(part.layout.from_gguf(values[0], self._sizes)).reshape(part.shape)

    @functools.cached_property
    def _sizes(self) -> Sizes:
        return sizes_of(models.build(self.config).config)

    def _found(self, tensors: Mapping[str, Any]) -> dict[str, "Part"]:
        """The Hub's name → the tensor's place in the file."""
        parts: dict[str, Part] = {}
        kind = self.config["model_type"]
        for hub_name, there in names.from_gguf(tensors, kind).items():
            members = tuple(tensors[name] for name in there.names)
            shape, layout = _shape(members[0]), FAMILIES[kind].gguf.layout_of(there.names[0])
            if there.joined:
                joined = _joined_shape(self.path, there.joined, members, self._sizes)
                parts[hub_name] = Part(members, joined, joined=there.joined)
            elif "{expert}" in hub_name:
                parts |= {
                    hub_name.format(expert=i): Part(members, shape[1:], i, layout=layout) for i in range(shape[0])
                }
            else:
                turned = layout is not None and layout.transposed
                parts[hub_name] = Part(members, shape[::-1] if turned else shape, layout=layout)
        return parts


def tokenizer_fields(path: Path) -> dict[str, Any]:
    """The file's tokenizer metadata, with "tokenizer." removed from the keys."""
    prefix, fields = "tokenizer.", _open(path).fields
    return {name.removeprefix(prefix): field.contents() for name, field in fields.items() if name.startswith(prefix)}


def _open(path: Path) -> Any:
    reader = _on_plain_arrays(require("gguf", "gguf").GGUFReader)
    try:
        return reader(path)
    except Exception as error:  # errors of any class: the package trusts every count and offset in the file
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is truncated, damaged or not GGUF: {type(error).__name__}: {error}"
        ) from error


def _on_plain_arrays(reader: type) -> type:
    """The package's reader, which would cut up a vocabulary as slices of np.memmap, in three times time and memory."""

    class Reader(reader):
        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._data = mapped.view(np.ndarray)

    return Reader


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


def _joined_shape(path: Path, joined: Joined, tensors: Sequence[Any], sizes: Sizes) -> tuple[int, ...]:
    """The shape of the Hub's tensor.

    Raises:
        UserError: the parts do not fit each other or the metadata.
    """
    parts = [jax.ShapeDtypeStruct(_shape(tensor), np.float32) for tensor in tensors]
    make: Callable[[Sequence[Any]], Any] = functools.partial(joined.made, sizes=sizes)
    try:
        return jax.eval_shape(make, parts).shape
    except (TypeError, ValueError) as error:
        found = ", ".join(f"{tensor.name} {_shape(tensor)}" for tensor in tensors)
        raise UserError(f"{path}: {found}: these shapes do not fit the metadata or each other ({error})") from error


class Part(NamedTuple):
    """The place of one of the Hub's tensors in the file.

    Attributes:
        tensors: the file's tensors.
        shape: the Hub's.
        expert: its index in the tensor's first axis; None if it is the whole tensor.
        layout: the layout of its values; None if it is the Hub's.
        joined: how it is put together; None if it is one tensor.
    """

    tensors: tuple[Any, ...]
    shape: tuple[int, ...]
    expert: int | None = None
    layout: Layout | None = None
    joined: Joined | None = None
