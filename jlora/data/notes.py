"""What readers and encoders of data tell: remarks, what was read, and each record that is left out."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from jlora.errors import PLACES, kind_of_fault, number_of

Note = Callable[[str], None]

FILE = "left_out.jsonl"


def warn(message: str) -> None:
    """The default for `note`: issues a Python warning."""
    warnings.warn(message, stacklevel=4)


class Notes:
    """Takes what is told about data.

    Called, it takes a remark, as any `Note` does; a plain function in its place hears nothing else.

    Args:
        remark: takes messages about what is not as it may have been meant.
        tell: takes messages about what was read.
        leave_out: takes (place, reason) of each record that is left out.
        counting: (what is done) → a context whose value is told how many records are done, and which share of all that
            is; None: nobody watches.
    """

    def __init__(
        self,
        remark: Note,
        tell: Note = lambda message: None,
        leave_out: Callable[[str, str], None] = lambda place, reason: None,
        counting: Callable[[str], contextlib.AbstractContextManager] | None = None,
    ) -> None:
        self._remark, self.tell, self.leave_out, self.counting = remark, tell, leave_out, counting

    def __call__(self, message: str) -> None:
        self._remark(message)

    def about(self, name: str) -> "Notes":
        """Takes what is told about one of several; messages begin with its name."""
        return Notes(
            lambda message: self(f"{name}: {message}"),
            lambda message: self.tell(f"{name}: {message}"),
            self.leave_out,
            self.counting and (lambda what: self.counting(f"{name}: {what}")),
        )


def as_notes(note: Note) -> Notes:
    """What takes everything that is told, and passes to a plain function what that takes."""
    return note if isinstance(note, Notes) else Notes(note)


class Kept(Notes):
    """Passes on what is told, and keeps it so that it can be told again; on disk, since it may be much."""

    def __init__(self, notes: Notes) -> None:
        self._told = _spool(self)
        tell, leave_out = notes.tell, notes.leave_out
        super().__init__(
            lambda message: self._keep(notes, ["remark", message]),
            lambda message: self._keep(tell, ["tell", message]),
            lambda place, reason: self._keep(leave_out, ["leave_out", place, reason]),
        )

    def _keep(self, tell: Callable, told: list[str]) -> None:
        self._told.write(json.dumps(told) + "\n")
        tell(*told[1:])

    def repeat(self, notes: Notes) -> None:
        """Tells everything again."""
        hears = {"remark": notes, "tell": notes.tell, "leave_out": notes.leave_out}
        self._told.seek(0)
        for line in self._told:
            kind, *words = json.loads(line)
            hears[kind](*words)

    def write(self, path: pathlib.Path) -> None:
        """Writes all to a file, for `read`."""
        self._told.seek(0)
        with path.open("w", encoding="utf-8") as stream:
            shutil.copyfileobj(self._told, stream)

    @classmethod
    def read(cls, path: pathlib.Path) -> "Kept":
        """What was written to the file, to be told again."""
        kept = cls(Notes(lambda message: None))
        with path.open(encoding="utf-8") as stream:
            shutil.copyfileobj(stream, kept._told)
        return kept


class Reason(NamedTuple):
    """Why records are left out: the first of them that was told for this kind of reason, its places and a count."""

    text: str
    places: tuple[str, ...]
    count: int


class LeftOut:
    """Records that are left out: counted by kinds of reason, and kept in a file of its own until `write`.

    Memory does not grow with their number.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, Reason] = {}
        self._file = _spool(self)

    def __call__(self, place: str, reason: str) -> None:
        """Adds one."""
        text, places, count = self._reasons.get(kind := kind_of_fault(reason), (reason, (), 0))
        self._reasons[kind] = Reason(text, (*places, place)[:PLACES], count + 1)
        self._file.write(json.dumps({"place": place, "reason": reason}, ensure_ascii=False) + "\n")

    @property
    def reasons(self) -> list[Reason]:
        """Each kind of reason, the most frequent first."""
        return sorted(self._reasons.values(), key=lambda reason: -reason.count)

    def __len__(self) -> int:
        return sum(reason.count for reason in self._reasons.values())

    def describe(self) -> str:
        """A sentence on how many are left out and why; "" if none is."""
        shown = [f"{reason.count:,}: {reason.text}" for reason in self.reasons]
        return f"left out: {number_of(len(self), 'record')}, listed in {FILE} ({'; '.join(shown)})" if shown else ""

    def write(self, folder: pathlib.Path) -> None:
        """Writes all to `FILE` in a folder as JSONL with "place" and "reason"; without any, removes the file."""
        path = folder / FILE
        if not self._reasons:
            path.unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        self._file.seek(0)
        with part.open("w", encoding="utf-8") as stream:
            shutil.copyfileobj(self._file, stream)
        self._file.seek(0, os.SEEK_END)
        os.replace(part, path)


def _spool(owner: Any) -> Any:
    """A text file that is in memory while it is small, and gone with its owner."""
    file = tempfile.SpooledTemporaryFile(max_size=2**20, mode="w+", encoding="utf-8")  # noqa: SIM115
    weakref.finalize(owner, file.close)
    return file
