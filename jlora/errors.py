"""What jlora raises for mistakes in its settings and inputs; anything else that it raises is a bug in jlora.

Every class is also a subclass of the matching built-in error, so that `except FileNotFoundError` works as expected.
"""

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
    kinds: dict[str, dict[str, list[str]]] = {}
    for place, fault in dict.fromkeys(found):
        kinds.setdefault(kind_of_fault(fault), {}).setdefault(fault, []).append(place)
    lines = []
    for faults in kinds.values():
        alike = list(faults.items())
        lines += [f"{_places(places)}: {fault}" for fault, places in alike[:PLACES]]
        if rest := sum(len(places) for _, places in alike[PLACES:]):
            lines.append(f"... and {rest} more of this kind")
    return lines


def _places(places: Sequence[str]) -> str:
    """The first places; a file that they share is named once: "train.jsonl:7, :12"."""
    first, *others = places[:PLACES]
    file = first.rpartition(":")[0]
    shown = [first, *(other.removeprefix(file) if file else other for other in others)]
    rest = f" and {len(places) - PLACES} more" if len(places) > PLACES else ""
    return ", ".join(shown) + rest


def raise_all(faults: Iterable[str]) -> None:
    """Raises one UserError that states each fault once; does nothing if there are none."""
    if faults := list(dict.fromkeys(faults)):
        raise UserError("\n".join(faults))
