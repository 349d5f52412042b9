"""What jlora raises for a mistake in what it was asked for or given; anything else that it raises is its own fault.

Every class is also the built-in error of its kind, so that `except FileNotFoundError` sees what it expects.
"""

import re
from collections.abc import Iterable, Sequence

SHOWN = 50
PLACES = 3

# What differs between faults of one kind: quoted values, numbers and indices, and lists of them.
_VALUE = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d[\w.+-]*)"""
_VARIABLE = re.compile(f"{_VALUE}(?:, {_VALUE})*")


class UserError(ValueError):
    """A setting, a file or an argument is not what it must be; the message says what, where, and what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that was named is not there, or is of another kind."""


class ExistingFileError(UserError, FileExistsError):
    """What would be written over is left alone."""


class UnknownNameError(UserError, KeyError):
    """A name that nothing has."""

    __str__ = ValueError.__str__  # that of KeyError puts the message in quotes


class MissingPackageError(ImportError, UserError):
    """An optional package that is not installed; the message names the extra."""


class Failed(RuntimeError):
    """A command cannot be finished, though what it was given is not wrong: a full disk, numbers that are not finite.

    The message says all that there is to say; no traceback is shown.
    """


class NoSpaceError(Failed, OSError):
    """There is no room on the disk for what was to be written."""


def describe_faults(title: str, faults: Sequence[str]) -> str:
    """One message with every fault on its own line; a very long list ends with the number of the rest."""
    rest = [f"... and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return f"{title}:\n  " + "\n  ".join([*faults[:SHOWN], *rest])


def group_faults(found: Iterable[tuple[str, str]]) -> list[str]:
    """Lines for `describe_faults` that say each kind of fault once.

    Of equal pairs one counts. Equal faults share a line with their first three places and a count of the rest. Of
    faults that differ in quoted values and numbers alone the first three are shown.

    Args:
        found: (place, fault) pairs, a place being for example "train.jsonl:7".
    """
    kinds: dict[str, dict[str, list[str]]] = {}
    for place, fault in dict.fromkeys(found):
        kinds.setdefault(_VARIABLE.sub("*", fault), {}).setdefault(fault, []).append(place)
    lines = []
    for faults in kinds.values():
        alike = list(faults.items())
        lines += [f"{_places(places)}: {fault}" for fault, places in alike[:PLACES]]
        if rest := sum(len(places) for _, places in alike[PLACES:]):
            lines.append(f"... and {rest} more of this kind")
    return lines


def _places(places: Sequence[str]) -> str:
    """The first places; the name of a file that they are all in is said once: "train.jsonl:7, :12"."""
    first, *others = places[:PLACES]
    file = first.rpartition(":")[0]
    shown = [first, *(other.removeprefix(file) if file else other for other in others)]
    rest = f" and {len(places) - PLACES} more" if len(places) > PLACES else ""
    return ", ".join(shown) + rest


def raise_all(faults: Iterable[str]) -> None:
    """Raise one UserError with every fault, each said once; do nothing where there is none."""
    if faults := list(dict.fromkeys(faults)):
        raise UserError("\n".join(faults))
