"""Encoded documents in a few flat arrays, in memory or mapped from files, so that each costs only its tokens."""

import array
import dataclasses
import io
import os
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import BinaryIO, overload

import numpy as np
from jaxtyping import Bool, Int32, Int64

COLUMNS = {"tokens": np.int32, "trained": np.bool_}


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document: its tokens, and for each whether the loss counts predicting it."""

    tokens: Int32[np.ndarray, " T"]
    trained: Bool[np.ndarray, " T"]


class Examples(Sequence[Example]):
    """Documents whose tokens lie one after another.

    Attributes:
        columns: "tokens" and "trained" of all documents.
        bounds: int64 [N + 1], where each document begins, and where the last one ends.
        checksum: of all tokens, which of them are trained, and their order, as eight hex digits.
    """

    def __init__(self, columns: dict[str, np.ndarray], bounds: Int64[np.ndarray, " N"], checksum: str) -> None:
        self.columns, self.bounds, self.checksum = columns, bounds, checksum

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each document."""
        return np.diff(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return Example(*(self.columns[name][self.bounds[place] : self.bounds[place + 1]] for name in COLUMNS))


class Writer:
    """Takes documents one by one and makes `Examples` of them.

    Args:
        folder: where their arrays are written, one file each; None for memory.
        fail: called with the OSError if they cannot be written; memory then holds them.
    """

    def __init__(
        self, folder: pathlib.Path | None = None, fail: Callable[[OSError], None] = lambda error: None
    ) -> None:
        self.folder, self._fail = folder, fail
        self._sizes, self._checksum = array.array("q", [0]), 0
        self._streams: dict[str, BinaryIO] = {name: io.BytesIO() for name in COLUMNS}
        if folder is not None:
            try:
                folder.mkdir(parents=True)
                self._streams = {name: open(folder / name, "x+b", buffering=0) for name in COLUMNS}  # noqa: SIM115
            except OSError as error:
                self._to_memory(error)

    def add(self, example: Example) -> None:
        """Appends a document."""
        for name, kind in COLUMNS.items():
            content = np.ascontiguousarray(getattr(example, name), kind).tobytes()
            self._checksum = zlib.crc32(content, self._checksum)
            try:
                self._write(name, content)
            except OSError as error:
                self._to_memory(error)
                self._write(name, content)
        self._sizes.append(self._sizes[-1] + len(example.tokens))

    def finish(self) -> Examples:
        """The documents; those in files are mapped, and the files complete."""
        bounds = np.array(self._sizes, np.int64)
        if self.folder is not None:
            try:
                for stream in self._streams.values():
                    os.fsync(stream.fileno())
                bounds.tofile(self.folder / "bounds")
            except OSError as error:
                self._to_memory(error)
        if self.folder is not None:
            self.close()
            columns = map_columns(self.folder)
        else:
            columns = {name: np.frombuffer(self._streams[name].getbuffer(), kind) for name, kind in COLUMNS.items()}
        return Examples(columns, bounds, f"{self._checksum:08x}")

    def close(self) -> None:
        """Closes the files; for a writer that cannot finish."""
        if self.folder is not None:
            for stream in self._streams.values():
                stream.close()

    def _write(self, name: str, content: bytes) -> None:
        """Writes all of the content behind what is whole already."""
        stream, start = self._streams[name], self._sizes[-1] * np.dtype(COLUMNS[name]).itemsize
        stream.seek(start)
        rest = memoryview(content)
        while len(rest):
            rest = rest[stream.write(rest) :]

    def _to_memory(self, error: OSError) -> None:
        """Goes on in memory, with what was written."""
        self._fail(error)
        streams, self._streams = self._streams, {name: io.BytesIO() for name in COLUMNS}
        for name, stream in streams.items():
            stream.seek(0)
            self._streams[name].write(stream.read())
            stream.close()
        self.folder = None


def map_columns(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of the files of a folder, mapped to memory; they have at least one element."""
    return {name: np.memmap(folder / name, kind, "r").view(np.ndarray) for name, kind in COLUMNS.items()}
