"""Safetensors checkpoints: one file, or shards with an index, memory-mapped and read one tensor at a time."""

import json
import math
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.errors import MissingFileError, UserError, describe_faults, number_of

SINGLE = "model.safetensors"
INDEX_SUFFIX = ".index.json"
INDEX = SINGLE + INDEX_SUFFIX
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


FIRST = 3  # how many faults of one kind are shown
CHUNK = 1 << 15  # values that are checked together: few enough to stay in the processor's cache


class TensorInfo(NamedTuple):
    """What a file's header says about a tensor; `dtype` is the file format's name for it.

    Attributes:
        span: where its bytes are in a safetensors file: (first, last + 1).
        stored: its name in the file, if it was given another (`SafetensorsFolder.rename`).
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    span: tuple[int, int] = (0, 0)
    stored: str = ""

    @property
    def nbytes(self) -> int:
        """How many bytes it has in a safetensors file."""
        return self.span[1] - self.span[0]


class SafetensorsFolder:
    """A folder with config.json and safetensors files; all but the tensors' data is read and checked on creation.

    Attributes:
        tensors: what can be read.
        aside: tensors of a model's other parts, which are never read (`jlora.hub.checkpoints.beside`).
        made: name → what makes a tensor that is stored in another form.
        scaled: how many are stored in 8 bits (`jlora.hub.checkpoints.fp8`).

    Raises:
        FileNotFoundError: config.json, all weights, or shards that the index names are missing.
        ValueError: a file is truncated or is not safetensors; all such files are named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        self.generation_config: dict[str, Any] | None = read_json(generation) if generation.is_file() else None
        self.tensors: dict[str, TensorInfo] = tensor_infos(weight_files(folder))
        self.aside: dict[str, TensorInfo] = {}
        self.made: dict[str, Callable[[], np.ndarray]] = {}
        self.scaled = 0

    def read(self, name: str) -> np.ndarray:
        """The tensor's values in the file's dtype, bfloat16 included; in float32 if they are stored in 8 bits."""
        if name in self.made:
            return self.made[name]()
        info = self.tensors[name]
        return read_tensor(info.file, info.stored or name)

    def rename(self, names: Mapping[str, str]) -> None:
        """Renames tensors: `names` gives new name → present name."""
        for name, stored in names.items():
            info = self.tensors.pop(stored)
            self.tensors[name] = info._replace(stored=info.stored or stored)
            if stored in self.made:
                self.made[name] = self.made.pop(stored)


def read_tensor(file: Path, name: str) -> np.ndarray:
    """One tensor of a safetensors file, in the file's dtype.

    Raises:
        UserError: the tensor cannot be read, or holds values that are not finite.
    """
    values = read_unchecked(file, name)
    require_finite({f"{file}: {name}": values})
    return values


def read_unchecked(file: Path, name: str) -> np.ndarray:
    """One tensor of a safetensors file; its values are not checked.

    Raises:
        UserError: the tensor cannot be read.
    """
    try:
        with safe_open(file, framework="numpy") as handle:
            return handle.get_tensor(name)
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two: dtypes that NumPy lacks
        raise UserError(f"{file}: {name} cannot be read ({error})") from error


def read_tensors(file: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Name → tensor, for several of a safetensors file, which is opened once: with many tensors that takes long.

    Raises:
        UserError: a tensor cannot be read, or some hold values that are not finite; the first such are named.
    """
    read, name = {}, "its header"
    try:
        with safe_open(file, framework="numpy") as handle:
            for name in names:
                read[name] = handle.get_tensor(name)
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: {name} cannot be read ({error})") from error
    require_finite({f"{file}: {name}": values for name, values in read.items()})
    return read


def read_part(file: Path, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
    """tensor[index] of one tensor of a safetensors file; nothing else of it is read.

    Raises:
        UserError: as `read_tensor`.
    """
    try:
        with safe_open(file, framework="numpy") as handle:
            values = handle.get_slice(name)[index]
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: {name} cannot be read ({error})") from error
    require_finite({f"{file}: {name}": values})
    return values


def read_blocks(file: Path, name: str, values: int) -> Iterator[np.ndarray]:
    """Yields one tensor in blocks of rows, each of about `values` values, which are not checked.

    Raises:
        UserError: as `read_unchecked`.
    """
    try:
        with safe_open(file, framework="numpy") as handle:
            part = handle.get_slice(name)
            count, *rest = part.get_shape()
            step = max(1, values // max(1, math.prod(rest)))
            for start in range(0, count, step):
                yield part[start : min(start + step, count)]
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: {name} cannot be read ({error})") from error


def require_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Checks that no value is NaN or infinite: nothing computed with such weights would be right.

    Raises:
        UserError: some are; the first such tensors are named, with their counts.
    """
    wrong = [name for name, values in tensors.items() if not _is_finite(values)]
    if not wrong:
        return
    found = []
    for name in wrong[:FIRST]:
        count = int(np.sum(~np.isfinite(tensors[name].astype(np.float64))))
        found.append(f"{name} holds {count} of {tensors[name].size} values that are NaN or infinite")
    rest = [f"... and {number_of(len(wrong) - FIRST, 'more tensor')}"] if len(wrong) > FIRST else []
    raise UserError(
        "\n".join([*found, *rest, "Go back to a checkpoint before the training diverged, or fetch the file again"])
    )


def _is_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; compares exponents in chunks, at the speed of memory."""
    if values.dtype not in DTYPES.values() or not values.size:
        return True
    bits = np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")
    limit = np.left_shift(np.asarray(np.inf, values.dtype).reshape(1).view(bits.dtype), 1)[0]
    shifted = np.empty(CHUNK, bits.dtype)  # the bits without the sign
    for start in range(0, bits.size, CHUNK):
        part = bits[start : start + CHUNK]
        if np.left_shift(part, 1, out=shifted[: part.size]).max() >= limit:
            return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold one JSON object.
    """
    if not path.is_file():
        raise MissingFileError(f"no {path.name} in {path.parent}; files there: {listing(path.parent)}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: deeply nested brackets
        raise UserError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint in `folder`; as in transformers, a single file takes precedence.

    Raises:
        FileNotFoundError: there are no weights, or shards that the index names are missing.
        UserError: the index is malformed.
    """
    if (folder / SINGLE).is_file():
        say_left_over(folder, SINGLE)
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise MissingFileError(_no_weights(folder))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    wrong = [
        name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name or len(name) > 255
    ]
    if wrong:
        raise UserError(f"{index}: the weight_map names {str(wrong[0])[:60]!r}, expected a file of this folder")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise MissingFileError(
            f"{index} names {number_of(len(files), 'file')}; {len(missing)} missing: {', '.join(missing)}"
        )
    return files


def tensor_infos(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Tensor name → its info from the headers of all `files`.

    Raises:
        ValueError: files are broken, or two of them hold the same tensor; all is listed.
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
        raise UserError(describe_faults("broken checkpoint", problems))
    return infos


def listing(folder: Path, limit: int = 20) -> str:
    """The names in a folder, for messages."""
    if not folder.is_dir():
        return "(no such folder)"
    found = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(found[:limit] + ["…"] * (len(found) > limit)) or "(none)"


def say_left_over(folder: Path, single: str) -> None:
    """Warns of an index beside the single file; the file is read then, as transformers and PEFT do."""
    if (folder / f"{single}{INDEX_SUFFIX}").is_file():
        warnings.warn(
            f"{folder}: {single} is read; {single}{INDEX_SUFFIX} and the files that it names are ignored. Delete "
            "whichever of the two is left over",
            stacklevel=3,
        )


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if not pickles:
        return f"no {SINGLE}, {INDEX} or .gguf file in {folder}; files there: {listing(folder)}"
    return (
        f"{folder} holds its weights only as pickles ({', '.join(pickles)}), which run code when opened, so jlora does "
        "not read them; convert them with transformers: model.save_pretrained(folder, safe_serialization=True)"
    )


def _header(file: Path) -> dict[str, TensorInfo]:
    """The file's tensors from its header, which is checked against the file's size before the library maps it."""
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
        infos = {name: _info(entry, file, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{file} is not safetensors: its header cannot be read ({error})") from error
    if size != expected:
        raise UserError(f"{file} is truncated or damaged: {size} bytes, expected {expected}; fetch or copy it again")
    try:
        with safe_open(file, framework="numpy"):
            return infos
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}") from error


def _info(entry: Mapping[str, Any], file: Path, start: int) -> TensorInfo:
    first, last = entry["data_offsets"]
    return TensorInfo(tuple(entry["shape"]), entry["dtype"], file, (start + first, start + last))
