"""Checks plain nested values against frozen dataclasses: every fault is collected, nothing is guessed.

This module knows only annotations and spelling; the dataclasses themselves check what the settings mean.
"""

import dataclasses
import difflib
import functools
import operator
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union

from jlora.errors import UserError

_SCALARS = (bool, int, float, str)


def convert(hint: Any, value: Any, path: str) -> tuple[Any, list[str]]:
    """The value converted to its annotation, and what is wrong with it (if anything, ignore the value).

    An int is accepted as a float; True and False are never numbers; a list is accepted as a tuple and vice versa.
    """
    if hint is Any or hint is object:
        return value, []
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if dataclasses.is_dataclass(hint):
        return (value, []) if isinstance(value, hint) else build(hint, value, path)
    if origin is Literal:
        return (value, []) if value in arguments else (None, [_mismatch(hint, value, path)])
    if hint in _SCALARS or hint is type(None):
        return _convert_scalar(hint, value, path)
    if (origin or hint) in (tuple, list, Sequence):
        return _convert_sequence(origin or hint, arguments, value, path)
    if (origin or hint) in (dict, Mapping):
        return _convert_mapping(hint, arguments, value, path)
    raise TypeError(f"{path}: settings cannot have the type {hint}")


def build(cls: type, values: Any, path: str = "") -> tuple[Any, list[str]]:
    """The dataclass built from a mapping, and every fault in it, each with its dotted path below `path`.

    Keys without a field are left to `unknown_keys`.
    """
    if not isinstance(values, Mapping):
        return None, [f"{path}: found {values!r}, expected a group with the keys {', '.join(fields_of(cls))}"]
    hints = typing.get_type_hints(cls)
    arguments, faults = {}, []
    for field in dataclasses.fields(cls):
        where = f"{path}.{field.name}" if path else field.name
        value = values.get(field.name)
        if value is None and is_required(field):
            found = [] if dataclasses.is_dataclass(hints[field.name]) else [f"{where}: is required"]
            arguments[field.name], more = (None, found) if found else build(hints[field.name], {}, where)
            faults += more
        elif field.name in values:
            arguments[field.name], more = convert(hints[field.name], value, where)
            faults += more
    if faults:
        return None, faults
    try:
        return cls(**arguments), []
    except UserError as error:
        return None, [_inset(error)]


def is_required(field: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def group_of(field: dataclasses.Field, hint: Any) -> type | None:
    """The dataclass of a group of settings that is there by default, even if it may be None; None for other fields."""
    if dataclasses.is_dataclass(hint):
        return hint
    return type(field.default) if dataclasses.is_dataclass(field.default) else None


def fields_of(cls: type) -> list[str]:
    """The names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(cls)]


def unknown_keys(cls: type, values: Mapping[str, Any]) -> list[str]:
    """A fault for each key, at any depth, that has no field, with the setting that was probably meant."""
    known = list(_settings(cls, values))
    faults = []
    for path in _paths(cls, values):
        group, _, key = path.rpartition(".")
        here = [name for name in known if group and name.rpartition(".")[0] == group] or _groups(known)
        near = [name for name in here if name == f"{group}.{group}_{key}"]
        near += [name for name in known if name.rpartition(".")[2] == key]
        close = difflib.get_close_matches(path, known if group else _groups(known), n=1, cutoff=0.75)
        near += [name for name in close if difflib.get_close_matches(key, [name.rpartition(".")[2]], cutoff=0.5)]
        words = {name: name.rpartition(".")[2].split("_") for name in here + known}
        near += [name for name in here if key in words[name]]
        near += [name for name, parts in words.items() if key == "".join(word[0] for word in parts if word)]
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(here)}"
        faults.append(f"{path}: unknown key; {hint}")
    return faults


def _convert_union(members: Sequence[Any], value: Any, path: str) -> tuple[Any, list[str]]:
    """The value as the first member type that accepts it; its own type is tried before those that convert it."""
    for member in sorted(members, key=lambda member: member is not type(value)):
        result, faults = convert(member, value, path)
        if not faults:
            return result, []
        if dataclasses.is_dataclass(member) and isinstance(value, Mapping):
            return None, faults
    return None, [_mismatch(functools.reduce(operator.or_, members), value, path)]


def _groups(known: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in known))


def _settings(cls: type, values: Any, path: str = "") -> Iterator[str]:
    """The dotted path of every setting; one that may be a scalar or a group counts as both.

    Of groups by name there are those that the values have.
    """
    for name, hint in typing.get_type_hints(cls).items():
        group, each = group_type(hint), each_type(hint)
        own = values.get(name) if isinstance(values, Mapping) else None
        if group is not hint:
            yield f"{path}{name}"
        if group is not None:
            yield from _settings(group, own, f"{path}{name}.")
        elif each is not None and isinstance(own, Mapping):
            for key, value in own.items():
                yield from _settings(each, value, f"{path}{name}.{key}.")


def _paths(cls: type, values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The dotted path of every key that has no field; for an unknown group, the paths of its keys instead."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        group, each = group_type(hints.get(key)), each_type(hints.get(key))
        if key not in hints and isinstance(value, Mapping) and value:
            yield from (f"{path}{key}.{inner}" for inner in value)
        elif key not in hints:
            yield f"{path}{key}"
        elif group is not None and isinstance(value, Mapping):
            yield from _paths(group, value, f"{path}{key}.")
        elif each is not None and isinstance(value, Mapping):
            for name, one in value.items():
                yield from _paths(each, one, f"{path}{key}.{name}.") if isinstance(one, Mapping) else ()


def each_type(hint: Any) -> type | None:
    """The dataclass of each value, for a mapping of groups by name; None for other annotations."""
    arguments = typing.get_args(hint)
    return group_type(arguments[1]) if typing.get_origin(hint) is Mapping and len(arguments) == 2 else None


def group_type(hint: Any) -> type | None:
    """The dataclass that an annotation is or allows, if any."""
    if typing.get_origin(hint) is Mapping:
        return None
    for member in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(member):
            return member
    return None


def _convert_scalar(hint: type, value: Any, path: str) -> tuple[Any, list[str]]:
    if type(value) is hint:
        return value, []
    if hint is float and type(value) is int:
        return float(value), []
    return None, [_mismatch(hint, value, path)]


def _convert_sequence(kind: Any, arguments: tuple, value: Any, path: str) -> tuple[Any, list[str]]:
    """The value as a list or tuple: `tuple[X, ...]` and `list[X]` repeat one type, `tuple[X, Y]` names each.

    Where a tuple of pairs is expected, a mapping stands for its items.
    """
    if isinstance(value, Mapping) and kind is tuple and arguments and len(typing.get_args(arguments[0])) == 2:
        value = tuple(value.items())
    named = kind is tuple and bool(arguments) and arguments[-1] is not Ellipsis
    if not isinstance(value, list | tuple) or (named and len(value) != len(arguments)):
        hint = kind[arguments] if arguments else kind
        return None, [_mismatch(hint, value, path)]
    hints = arguments if named else [arguments[0] if arguments else Any] * len(value)
    pairs = [convert(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))]
    made = [item for item, _ in pairs]
    return (made if kind is list else tuple(made)), [fault for _, faults in pairs for fault in faults]


def _convert_mapping(hint: Any, arguments: tuple, value: Any, path: str) -> tuple[Any, list[str]]:
    if not isinstance(value, Mapping):
        return None, [_mismatch(hint, value, path)]
    key_hint, value_hint = arguments or (Any, Any)
    made, faults = {}, []
    for key, item in value.items():
        made_key, key_faults = convert(key_hint, key, f"{path}: key")
        made[made_key], item_faults = convert(value_hint, item, f"{path}[{key!r}]")
        faults += key_faults + item_faults
    return made, faults


def _mismatch(hint: Any, value: Any, path: str) -> str:
    return f"{path}: found {value!r} ({type(value).__name__}), expected {describe(hint)}"


def describe(hint: Any) -> str:
    """An annotation in words: `int | None` → 'int or None'."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in arguments)
    if dataclasses.is_dataclass(hint):
        return f"a group with the keys {', '.join(fields_of(hint))}"
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and not arguments:
        return hint.__name__
    return str(hint).replace("collections.abc.", "").replace("typing.", "")


def _inset(error: UserError) -> str:
    """The message of a dataclass's own check, indented so that it remains one entry in a list of faults."""
    return str(error).replace("\n", "\n  ")
