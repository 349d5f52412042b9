"""What jlora raises for mistakes in its settings and inputs; anything else that it raises is a bug in jlora.

Every class is also a subclass of the matching built-in error, so that `except FileNotFoundError` works as expected.
"""

import collections
import re
from collections.abc import Iterable, Sequence

SHOWN = 50
PLACES = 3

# The parts that differ between faults of one kind: quoted values, numbers and indices, and lists of them.
_VALUE = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d[\w.+-]*)"""
_VARIABLE = re.compile(f"{_VALUE}(?:, {_VALUE})*")


class UserError(ValueError):
    """A setting, a file or an argument is invalid; the message says what, where, and what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A named file or folder does not exist, or is of another kind."""


class ExistingFileError(UserError, FileExistsError):
    """A file or folder would have been overwritten; it is left alone."""


class UnknownNameError(UserError, KeyError):
    """A name that does not exist."""

    __str__ = ValueError.__str__  # KeyError's puts the message in quotes


class MissingPackageError(ImportError, UserError):
    """An optional package is not installed; the message names the extra to install."""


class Failed(RuntimeError):
    """A command cannot finish although its input is valid: a full disk, numbers that are not finite.

    The message says everything; no traceback is shown.
    """


class NoSpaceError(Failed, OSError):
    """The disk does not have enough room for what would be written."""


def describe_faults(title: str, faults: Sequence[str]) -> str:
    """One message with each fault on its own line; a very long list ends with a count of the rest."""
    rest = [f"... and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return f"{title}:\n  " + "\n  ".join([*faults[:SHOWN], *rest])


def first_few(values: Iterable[object], most: int = 3) -> str:
    """The first values, with an ellipsis after them if there are more."""
    shown = list(map(str, values))
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")


def is_of_the_system(error: BaseException | None) -> bool:
    """Whether it is an error of the operating system, or what TensorStore makes of one."""
    return isinstance(error, OSError) or "os_error_code" in str(error)


def number_of(count: int, noun: str) -> str:
    """'1 record', '2,000 records'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size_of(count: int) -> str:
    """A number of bytes as text: '8.59 GiB', '12.0 MiB', '0.4 KiB'."""
    for power, digits, least, unit in ((30, 2, 2**28, "GiB"), (20, 1, 2**20, "MiB")):
        if count >= least:
            return f"{count / 2**power:,.{digits}f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def kind_of_fault(fault: str) -> str:
    """What a fault has in common with those that differ only in quoted values and numbers."""
    return _VARIABLE.sub("*", fault)


def group_faults(found: Iterable[tuple[str, str]]) -> list[str]:
    """Lines for `describe_faults` that state each kind of fault once.

    Duplicate pairs count once. Equal faults share a line with their first three places and a count of the rest. Where
    faults differ only in quoted values and numbers, the first three are shown.

    Args:
        found: (place, fault) pairs; a place is, for example, "train.jsonl:7".
    """
    grouped = Grouped()
    for place, fault in dict.fromkeys(found):
        grouped.add(place, fault)
    return grouped.lines()


class Grouped:
    """Faults of one place after another, of which no more is kept than `group_faults` says of them."""

    def __init__(self) -> None:
        self._kinds: dict[str, dict[str, _Places]] = {}
        self._rest: collections.Counter[str] = collections.Counter()
        self._last: tuple[str, set[str]] = "", set()  # a place and its faults

    def add(self, place: str, fault: str) -> None:
        """Adds a fault of a place, once."""
        if place != self._last[0]:
            self._last = place, set()
        if fault in self._last[1]:
            return
        self._last[1].add(fault)
        alike = self._kinds.setdefault(kind := kind_of_fault(fault), {})
        if fault in alike or len(alike) < PLACES:
            alike.setdefault(fault, _Places()).add(place)
        else:
            self._rest[kind] += 1

    def lines(self) -> list[str]:
        """The lines of `group_faults`."""
        lines = []
        for kind, alike in self._kinds.items():
            lines += [f"{places}: {fault}" for fault, places in alike.items()]
            if rest := self._rest[kind]:
                lines.append(f"... and {rest} more of this kind")
        return lines


class _Places:
    """The first places of a fault, and how many there are. A file that they share is named once: "a.jsonl:7, :12"."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._count = 0

    def add(self, place: str) -> None:
        self._count += 1
        if len(self._first) < PLACES:
            self._first.append(place)

    def __str__(self) -> str:
        first, *others = self._first
        file = first.rpartition(":")[0]
        shown = [first, *(other.removeprefix(file) if file else other for other in others)]
        rest = f" and {self._count - PLACES} more" if self._count > PLACES else ""
        return ", ".join(shown) + rest


def raise_all(faults: Iterable[str]) -> None:
    """Raises one UserError that states each fault once; does nothing if there are none."""
    if faults := list(dict.fromkeys(faults)):
        raise UserError("\n".join(faults))
