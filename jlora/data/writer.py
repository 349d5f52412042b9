"""From items one after another to flat arrays, in memory or in files that are mapped to it."""

import array
import io
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import numpy as np

from jlora.data.store import COLUMNS, Examples, Item, Items, Record, Records, common_start
from jlora.errors import UserError, describe_faults, number_of

# What grows while items are added: the documents, and the text of records that are kept with them.
STREAMS = COLUMNS | {"records": np.uint8}
# One array each: of bounds, of the items' common starts and of their values.
NUMBERS = {"bounds": np.int64, "record_bounds": np.int64, "shared": np.int32, "values": np.float64}
RESERVED = ("tokens", "targets", "weights", "positions", "segment_ids", "documents", "items")


def flat(items: Sequence[Item]) -> Items:
    """The items in flat arrays.

    Raises:
        UserError: there are none; or they differ in their number of documents or in the names of their values.
    """
    if isinstance(items, Items):
        return items
    writer = Writer()
    for item in items:
        writer.add(item)
    return writer.finish()


class Writer:
    """Takes items one by one and makes `Items` of them.

    Args:
        folder: where their arrays are written, one file each; None for memory.
        fail: called with what is wrong if they cannot be written; memory then holds them.
    """

    def __init__(
        self, folder: pathlib.Path | None = None, fail: Callable[[Exception], None] = lambda error: None
    ) -> None:
        self.folder, self._fail = folder, fail
        self._checksum, self._ends = 0, dict.fromkeys(STREAMS, 0)  # where each stream's whole content ends, in bytes
        self._bounds, self._record_bounds = array.array("q", [0]), array.array("q", [0])
        self._shared, self._values = array.array("i"), array.array("d")
        self._kind: tuple[int, list[str]] | None = None  # documents of an item, and the names of its values
        self._faults: list[str] = []
        self._held: list[Record] | None = None  # all records, if some are not JSON
        self._streams: dict[str, BinaryIO] = {name: io.BytesIO() for name in STREAMS}
        if folder is not None:
            try:
                folder.mkdir(parents=True)
                self._streams = {name: open(folder / name, "x+b", buffering=0) for name in STREAMS}  # noqa: SIM115
            except OSError as error:
                self._to_memory(error)

    def add(self, item: Item) -> None:
        """Appends an item; every item has a record, or none has.

        Records that are not JSON, such as those with dates, stay in memory, and everything with them.
        """
        kind = len(item.documents), sorted(item.values)
        self._kind = self._kind or kind
        if kind != self._kind:
            self._faults.append(
                f"item {len(self._shared)}: found {number_of(kind[0], 'document')} and the values {kind[1]}, expected "
                f"{self._kind[0]} and {self._kind[1]}, as in the first item"
            )
        for document in item.documents:
            arrays = {name: np.ascontiguousarray(getattr(document, name), kind) for name, kind in COLUMNS.items()}
            contents = {name: values.tobytes() for name, values in arrays.items()}
            for content in contents.values():
                self._checksum = zlib.crc32(content, self._checksum)
            self._append(contents)
            self._bounds.append(self._bounds[-1] + len(document.tokens))
        self._shared.append(common_start(item.documents))
        self._values.extend(float(item.values[name]) for name in kind[1])
        if item.record is not None:
            self._keep(item.record)

    def finish(self) -> Items:
        """The items; those in files are mapped, and the files complete.

        Raises:
            UserError: there are none; or they differ in their number of documents or in the names of their values.
        """
        sides, names = self._checked()
        numbers = {name: getattr(self, f"_{name}") for name in NUMBERS}
        arrays = {name: np.array(numbers[name], kind) for name, kind in NUMBERS.items()}
        if self.folder is not None:
            try:
                for stream in self._streams.values():
                    os.fsync(stream.fileno())
                for name, values in arrays.items():
                    values.tofile(self.folder / name)
            except OSError as error:
                self._to_memory(error)
        if self.folder is not None:
            self.close()
            streams = _mapped(self.folder)
        else:
            streams = {name: np.frombuffer(self._streams[name].getbuffer(), kind) for name, kind in STREAMS.items()}
        return _items(streams, arrays, f"{self._checksum:08x}", sides, names, self._held)

    def close(self) -> None:
        """Closes the files; for a writer that cannot finish."""
        if self.folder is not None:
            for stream in self._streams.values():
                stream.close()

    def _checked(self) -> tuple[int, list[str]]:
        if self._kind is None:
            raise UserError("found no items, expected at least one")
        if taken := sorted(set(self._kind[1]) & set(RESERVED)):
            fault = f"found values called {taken}, expected names other than {', '.join(RESERVED)}"
            self._faults.append(fault)
        if self._faults:
            raise UserError(describe_faults("the items do not go together", self._faults))
        return self._kind

    def _keep(self, record: Record) -> None:
        if self._held is None:
            try:
                content = json.dumps(record).encode()
            except (TypeError, ValueError) as error:
                self._held = list(Records(self._content("records"), np.array(self._record_bounds, np.int64)))
                if self.folder is not None:
                    self._to_memory(error)
            else:
                self._append({"records": content})
                self._record_bounds.append(self._ends["records"])
                return
        self._held.append(record)

    def _append(self, contents: Mapping[str, bytes]) -> None:
        """Writes all of the contents behind what is whole already."""
        for name, content in contents.items():
            try:
                self._write(name, content)
            except OSError as error:
                self._to_memory(error)
                self._write(name, content)
        for name, content in contents.items():
            self._ends[name] += len(content)

    def _write(self, name: str, content: bytes) -> None:
        stream = self._streams[name]
        stream.seek(self._ends[name])
        rest = memoryview(content)
        while len(rest):
            rest = rest[stream.write(rest) :]

    def _content(self, name: str) -> np.ndarray:
        self._streams[name].seek(0)
        return np.frombuffer(self._streams[name].read(), np.uint8)

    def _to_memory(self, error: Exception) -> None:
        """Goes on in memory, with what was written."""
        self._fail(error)
        streams, self._streams = self._streams, {name: io.BytesIO() for name in STREAMS}
        for name, stream in streams.items():
            stream.seek(0)
            self._streams[name].write(stream.read())
            stream.close()
        self.folder = None


def open_items(folder: pathlib.Path, checksum: str, sides: int, names: Sequence[str]) -> Items:
    """The items that a `Writer` left in a folder, mapped to memory; they are `Items` of these attributes.

    Raises:
        OSError, ValueError: files are missing or do not go together.
    """
    arrays = {name: np.fromfile(folder / name, kind) for name, kind in NUMBERS.items()}
    return _items(_mapped(folder), arrays, checksum, sides, names)


def _mapped(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {
        name: np.memmap(folder / name, kind, "r").view(np.ndarray)
        if (folder / name).stat().st_size
        else np.zeros(0, kind)
        for name, kind in STREAMS.items()
    }


def _items(
    streams: dict[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    checksum: str,
    sides: int,
    names: Sequence[str],
    records: Sequence[Record] | None = None,
) -> Items:
    values = arrays["values"].reshape(len(arrays["shared"]), len(names)).T
    examples = Examples({name: streams[name] for name in COLUMNS}, arrays["bounds"], checksum)
    if records is None:
        records = Records(streams["records"], arrays["record_bounds"])
    return Items(examples, sides, dict(zip(names, values, strict=True)), arrays["shared"], records)
