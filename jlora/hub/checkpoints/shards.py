"""Writes one safetensors file of new tensors and of others that are copied from files, byte for byte."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jlora.errors import UserError
from jlora.hub.checkpoints.weights import DTYPES, TensorInfo

# "writer" says that jlora wrote the file, and may write over it.
WRITER = {"writer": "jlora"}
METADATA = {"format": "pt"} | WRITER
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
}
ALIGNMENT = 8  # the data begins at a multiple of this many bytes


def save_shard(file: Path, tensors: Mapping[str, np.ndarray], copied: Mapping[str, TensorInfo]) -> None:
    """Writes the file; a copied tensor is never held as a whole.

    Raises:
        UserError: a file that tensors are copied from has become shorter.
    """
    # Not by safetensors' own function: it writes metadata of two keys in any order, so that equal files would differ.
    sizes = {name: value.nbytes for name, value in tensors.items()} | {name: i.nbytes for name, i in copied.items()}
    # In the order that safetensors has: wider values first, so that every tensor is aligned to its own.
    order = sorted(sizes, key=lambda name: (-_width(sizes[name], _shape(tensors, copied, name)), name))
    with file.open("wb") as stream:
        stream.write(_header(tensors, copied, {name: sizes[name] for name in order}))
        for name in order:
            if name in copied:
                _copy(copied[name], stream)
            else:
                stream.write(np.ascontiguousarray(tensors[name]).tobytes())


def _header(tensors: Mapping[str, np.ndarray], copied: Mapping[str, TensorInfo], sizes: Mapping[str, int]) -> bytes:
    entries, start = {}, 0
    for name, size in sizes.items():
        dtype = copied[name].dtype if name in copied else NAMES[tensors[name].dtype]
        shape, offsets = list(_shape(tensors, copied, name)), [start, start + size]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        start += size
    text = json.dumps({"__metadata__": METADATA, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _shape(tensors: Mapping[str, np.ndarray], copied: Mapping[str, TensorInfo], name: str) -> tuple[int, ...]:
    return copied[name].shape if name in copied else tensors[name].shape


def _width(size: int, shape: tuple[int, ...]) -> int:
    return size // max(1, math.prod(shape))


def _copy(info: TensorInfo, stream: BinaryIO) -> None:
    start, stop = info.span
    with info.file.open("rb") as source:
        source.seek(start)
        before = stream.tell()
        part = _Part(source, stop - start)
        shutil.copyfileobj(part, stream)
        if stream.tell() - before != stop - start:
            raise UserError(f"{info.file} has become shorter while it was copied")


class _Part:
    """The next bytes of a file, as a file."""

    def __init__(self, source: BinaryIO, size: int) -> None:
        self.source, self.left = source, size

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the part's end."""
        found = self.source.read(min(size, self.left))
        self.left -= len(found)
        return found
