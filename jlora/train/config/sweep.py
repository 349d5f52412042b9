"""Sweeps: runs of several adapters, one for every combination of some settings' values."""

import ast
import collections
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jlora.errors import UserError
from jlora.train.algorithms import ALGORITHMS
from jlora.train.config import typed
from jlora.train.config.run import OWN, RunConfig, plain_values, resolve, trained_alone

LONGEST_NAME = 150  # of an adapter, since it names a folder

_SETTING = re.compile(r"(?:^|\s)\s*([A-Za-z_][\w.]*)=")
_PIECE = re.compile(r"""'[^']*'|"[^"]*"|[^'"\[\](){},]+|.""", re.DOTALL)


class Value(NamedTuple):
    """A setting's value as it was written, and what that means."""

    text: str
    meaning: Any


# Settings that go together, each with its values.
Axis = dict[str, list[Value]]
# One value of each setting.
Choice = dict[str, Value]


def swept(config: ConfigDict | Mapping[str, Any], sweeps: Sequence[str]) -> RunConfig:
    """The run of one adapter for every combination of the sweeps' values, named by them: "learning_rate-1e-4_r-8".

    Args:
        sweeps: "GROUP.KEY=VALUE,VALUE". Several settings in one text, with blanks between them, go together: one
            combination has the first value of each, the next one the second values, and so on.

    Raises:
        UserError: whatever is wrong with the sweeps, or with the settings that they lead to; all in one message.
    """
    values = plain_values(config)
    axes = list(map(_axis, sweeps))
    unfit = {name: fault for axis in axes for name in axis for fault in _setting_faults(name)}
    faults = [*_form_faults(axes, sweeps), *unfit.values()]
    fit = [{name: found for name, found in axis.items() if name not in unfit} for axis in axes]
    choices = [_joined(row) for row in itertools.product(*(_rows(axis) for axis in fit if axis))]
    names = _names(choices)
    adapters = {name: _grouped(choice) for name, choice in zip(names, choices, strict=True)}
    faults += _name_faults(names, choices)
    if values.get("adapters"):
        faults.append(f"--sweep: the settings have adapters already ({', '.join(values['adapters'])}); leave one out")
    if values.get("algorithm") in ALGORITHMS:
        faults += trained_alone(values["algorithm"])
    for choice in choices:
        alone = _changed(values, _grouped(choice)) | {"adapters": {}}
        faults += typed.unknown_keys(RunConfig, alone) + typed.build(RunConfig, alone)[1]
    if faults:
        raise UserError("the settings are invalid:\n  " + "\n  ".join(dict.fromkeys(faults)))
    return resolve(values | {"adapters": adapters})


def _axis(text: str) -> Axis:
    """The settings of one sweep; {} if it names none at its beginning. One that is repeated gets all of its values."""
    found = list(_SETTING.finditer(text))
    if not found or found[0].start():
        return {}
    ends = [following.start() for following in found[1:]] + [len(text)]
    axis: Axis = collections.defaultdict(list)
    for setting, end in zip(found, ends, strict=True):
        axis[setting[1]] += [_value(part.strip()) for part in _parts(text[setting.end() : end])]
    return dict(axis)


def _parts(text: str) -> Iterator[str]:
    """The text between commas that are outside brackets and quotes."""
    part, depth = "", 0
    for piece in _PIECE.findall(text):
        depth += (piece in "[({") - (piece in "])}")
        if piece == "," and depth <= 0:
            yield part
            part = ""
        else:
            part += piece
    yield part


def _value(text: str) -> Value:
    """A Python literal, or the text itself."""
    try:
        return Value(text, ast.literal_eval(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return Value(text, text)


def _rows(axis: Axis) -> list[Choice]:
    return [dict(zip(axis, row, strict=True)) for row in zip(*axis.values(), strict=False)]


def _joined(row: Sequence[Choice]) -> Choice:
    return {name: value for choice in row for name, value in choice.items()}


def _grouped(choice: Choice) -> dict[str, dict[str, Any]]:
    """The values as an adapter's own settings, by group."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in choice.items():
        group, _, key = name.partition(".")
        groups.setdefault(group, {})[key] = value.meaning
    return groups


def _changed(values: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    groups = {group: values.get(group, {}) for group in own}
    return dict(values) | {
        group: {**value, **own[group]} if isinstance(value, Mapping) else value for group, value in groups.items()
    }


def _names(choices: Sequence[Choice]) -> list[str]:
    """A name for each choice that can be a folder's: settings by their last words, unless two end in the same."""
    settings = list(choices[0]) if choices else []
    last = collections.Counter(setting.rpartition(".")[2] for setting in settings)
    short = {setting: word if last[word := setting.rpartition(".")[2]] == 1 else setting for setting in settings}
    return ["_".join(f"{short[name]}-{_safe(value)}" for name, value in choice.items()) for choice in choices]


def _safe(value: Value) -> str:
    text = value.meaning if isinstance(value.meaning, str) else value.text
    if isinstance(value.meaning, int | float):
        return text.replace("+", "")
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def _form_faults(axes: Sequence[Axis], sweeps: Sequence[str]) -> Iterator[str]:
    for axis, text in zip(axes, sweeps, strict=True):
        if not axis:
            yield f"--sweep: found {text!r}, expected GROUP.KEY=VALUE,VALUE"
            continue
        together = " and ".join(axis)
        if any(not value.text for values in axis.values() for value in values):
            yield f"{together}: found an empty value in {text!r}"
        if len(set(map(len, axis.values()))) > 1:
            counts = " and ".join(str(len(values)) for values in axis.values())
            yield f"{together}: found {counts} values, expected as many of each, since they go together"
        rows = [[value.meaning for value in row.values()] for row in _rows(axis)]
        if len(rows) == 1:
            found = " ".join(f"--config.{name}={values[0].text}" for name, values in axis.items())
            yield f"{together}: found one value, expected two or more; one is set by {found}"
        for row in [row for place, row in enumerate(rows) if row in rows[:place]]:
            yield f"{together}: found {', '.join(map(repr, row))} twice, expected values that differ"
    count = collections.Counter(name for axis in axes for name in axis)
    yield from (f"{name}: is swept {times} times, expected once" for name, times in count.items() if times > 1)


def _setting_faults(name: str) -> list[str]:
    group, dot, key = name.partition(".")
    if unknown := typed.unknown_keys(RunConfig, {group: {key: None}} if dot else {name: None}):
        return unknown
    if dot and (name in OWN or group in OWN):
        return []
    return [f"{name}: is the same for all adapters of a run; a sweep may be over {', '.join(OWN)}"]


def _name_faults(names: Sequence[str], choices: Sequence[Choice]) -> Iterator[str]:
    said = [{name: value.meaning for name, value in choice.items()} for choice in choices]
    for place, name in enumerate(names):
        before = names.index(name)
        if said[before] != said[place]:
            both = " and ".join(str(said[one]) for one in (before, place))
            yield f"--sweep: {both} would both be in the folder {name}; give one of them another spelling"
        if len(name) > LONGEST_NAME:
            yield f"--sweep: {name} would name a folder, expected at most {LONGEST_NAME} characters; use shorter values"
