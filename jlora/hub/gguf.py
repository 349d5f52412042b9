"""GGUF files, dequantised one tensor at a time into the Hub's names and layout.

Which architectures are read, and how their metadata becomes a config.json, is in `gguf_config`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.hub import gguf_config, names
from jlora.hub.weights import TensorInfo
from jlora.types import require


class GGUFFile:
    """One .gguf file, its metadata turned into the config.json and the tensor names of the same model on the Hub.

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
        self.config: dict[str, Any] = gguf_config.read_config(
            path, fields, shapes, lambda name: _dequantize(tensors[name], tensors[name].data)
        )
        self.generation_config: dict[str, Any] | None = gguf_config.generation_config(fields)
        self._parts = _parts(tensors, self.config["model_type"])
        known = {part.tensor.name for part in self._parts.values()} | gguf_config.ROTARY
        unknown = {name: Part(tensor, _shape(tensor)) for name, tensor in tensors.items() if name not in known}
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(part.shape, part.tensor.tensor_type.name, path)
            for name, part in (self._parts | unknown).items()
        }

    def rename(self, names: Mapping[str, str]) -> None:
        """Nothing: every tensor has the Hub's name already."""

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32, in the Hub's layout."""
        tensor, shape, expert, restore = self._parts[name]
        values = _dequantize(tensor, tensor.data if expert is None else tensor.data[expert])
        if restore is None:
            return values.reshape(shape)
        return np.ascontiguousarray(restore(values, self.config)).reshape(shape)


def tokenizer_fields(path: Path) -> dict[str, Any]:
    """What the file says of its tokenizer: its metadata by the names that follow "tokenizer."."""
    prefix, fields = "tokenizer.", _open(path).fields
    return {name.removeprefix(prefix): field.contents() for name, field in fields.items() if name.startswith(prefix)}


def _open(path: Path) -> Any:
    gguf = require("gguf", "gguf")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is truncated, damaged or not GGUF: {error}") from error


def _is_small(name: str) -> bool:
    # The vocabulary takes seconds to unpack, and is the tokenizer's business.
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
    """All of the tensor's data, or the rows of it that `data` is."""
    quants = require("gguf.quants", "gguf")
    try:
        return quants.dequantize(data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"{tensor.name} is packed as {tensor.tensor_type.name}, which gguf cannot unpack") from error


Restore = Callable[[np.ndarray, dict[str, Any]], np.ndarray]


class Part(NamedTuple):
    """Where one of the Hub's tensors lies in the file.

    Attributes:
        shape: the Hub's.
        expert: which entry of the tensor's first axis it is; None: all of it.
        restore: takes values and config.json, returns the values as the Hub has them; None: they are so already.
    """

    tensor: Any
    shape: tuple[int, ...]
    expert: int | None = None
    restore: Restore | None = None


def _parts(tensors: Mapping[str, Any], model_type: str) -> dict[str, Part]:
    """The Hub's name → where that tensor lies."""
    parts: dict[str, Part] = {}
    for name, hub_name in names.from_gguf(tensors, model_type).items():
        tensor, shape = tensors[name], _shape(tensors[name])
        restore = _restore(name, model_type)
        if "{expert}" in hub_name:
            parts |= {hub_name.format(expert=i): Part(tensor, shape[1:], i, restore) for i in range(shape[0])}
        else:
            parts[hub_name] = Part(tensor, shape[::-1] if restore is _transposed else shape, None, restore)
    return parts


def _restore(name: str, model_type: str) -> Restore | None:
    found = [restore for pattern, restore in LAYOUTS.get(model_type, ()) if re.fullmatch(pattern, name)]
    return found[0] if found else None


def _queries(values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    return _halves(values, config["num_attention_heads"])


def _keys(values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    return _halves(values, config["num_key_value_heads"])


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows (h, f, half) reordered to (h, half, f): from interleaved rotary pairs to the Hub's two halves."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _by_head(values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows (3, h, f) reordered to (h, 3, f): from all queries, keys and values to those of head after head."""
    parts = values.reshape(3, config["num_attention_heads"], -1, *values.shape[1:])
    return parts.swapaxes(0, 1).reshape(values.shape)


def _less_one(values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    return values - 1


def _transposed(values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    return values.T


INTERLEAVED = ((r"blk\.\d+\.attn_q\.(weight|bias)", _queries), (r"blk\.\d+\.attn_k\.(weight|bias)", _keys))
# Gemma's norms multiply by 1 + weight, of which the file has the sum.
PLUS_ONE = ((r".*norm\.weight", _less_one),)
# model_type → (pattern of GGUF's names, how the Hub's layout is restored); what is not listed is laid out alike.
LAYOUTS: dict[str, tuple[tuple[str, Restore], ...]] = {
    "llama": INTERLEAVED,
    "mistral": INTERLEAVED,
    "mixtral": INTERLEAVED,
    "granite": INTERLEAVED,
    "smollm3": INTERLEAVED,
    "gemma": PLUS_ONE,
    "gemma2": PLUS_ONE,
    "gemma3_text": PLUS_ONE,
    "gpt2": ((r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", _transposed),),
    "gpt_neox": ((r"blk\.\d+\.attn_qkv\.(weight|bias)", _by_head),),
}
