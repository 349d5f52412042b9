"""Safetensors checkpoints: one file, or shards with an index, read one tensor at a time out of memory-mapped files."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.errors import MissingFileError, UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class TensorInfo(NamedTuple):
    """What a file says about a tensor before it is read; `dtype` is the file format's word for it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class SafetensorsFolder:
    """A folder with config.json and safetensors files; everything but the tensors' data is read and checked at once.

    Raises:
        FileNotFoundError: config.json, every weight file, or shards named by the index are missing.
        ValueError: a file is truncated or is not safetensors; all such files are named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        self.generation_config: dict[str, Any] | None = read_json(generation) if generation.is_file() else None
        self.tensors: dict[str, TensorInfo] = tensor_infos(weight_files(folder))
        self._stored: dict[str, str] = {}

    def read(self, name: str) -> np.ndarray:
        """The tensor's values in the file's own dtype, bfloat16 included."""
        return read_tensor(self.tensors[name].file, self._stored.get(name, name))

    def rename(self, names: Mapping[str, str]) -> None:
        """From now on the tensors that are the values of `names` go by its keys."""
        for name, stored in names.items():
            self.tensors[name] = self.tensors.pop(stored)
            self._stored[name] = stored


def read_tensor(file: Path, name: str) -> np.ndarray:
    """One tensor of a safetensors file, in its own dtype."""
    with safe_open(file, framework="numpy") as handle:
        return handle.get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold one JSON object.
    """
    if not path.is_file():
        raise MissingFileError(f"no {path.name} in {path.parent}; files there: {listing(path.parent)}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `folder`."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX} has no weight_map")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise MissingFileError(
                f"{folder / INDEX} names {len(files)} files, of which {len(missing)} are missing: {', '.join(missing)}"
            )
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise MissingFileError(_no_weights(folder))


def tensor_infos(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Tensor name → what the headers of all `files` say about it.

    Raises:
        ValueError: broken files, each with what is wrong, or tensors that two files hold.
    """
    infos: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for file in files:
        try:
            found = _header(file)
        except UserError as error:
            problems.append(str(error))
            continue
        problems += [f"{name} is in both {infos[name].file} and {file}" for name in found if name in infos]
        infos |= found
    if problems:
        raise UserError("broken checkpoint:\n  " + "\n  ".join(problems))
    return infos


def listing(folder: Path, limit: int = 20) -> str:
    """The names in a folder, for messages."""
    if not folder.is_dir():
        return "(no such folder)"
    found = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(found[:limit] + ["…"] * (len(found) > limit)) or "(none)"


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if not pickles:
        return f"no {SINGLE}, {INDEX} or .gguf file in {folder}; files there: {listing(folder)}"
    return (
        f"{folder} holds its weights only as pickles ({', '.join(pickles)}), which run code when opened, so jlora does "
        "not read them; convert them with transformers: model.save_pretrained(folder, safe_serialization=True)"
    )


def _header(file: Path) -> dict[str, TensorInfo]:
    """The file's tensors by its header, checked against the file's size before the library maps it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length < 2 or 8 + length > size:
            raise UserError(f"{file} is truncated or not safetensors: {size} bytes, its header claims {length}")
        text = stream.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        infos = {name: TensorInfo(tuple(entry["shape"]), entry["dtype"], file) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{file} is not safetensors: its header cannot be read ({error})") from error
    if size != expected:
        raise UserError(f"{file} is truncated or damaged: {size} bytes, expected {expected}; fetch or copy it again")
    try:
        with safe_open(file, framework="numpy"):
            return infos
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}") from error
