"""Recipes for merging whole models, in mergekit's format: read and checked before any model is opened."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import MissingFileError, UserError
from jlora.families import called
from jlora.hub.checkpoints.source import Source, open_source
from jlora.hub.checkpoints.weights import DTYPES
from jlora.hub.recipes.methods import METHODS
from jlora.hub.recipes.spelling import common_tokenizer, in_own_form, sum_of_adapter

LAYER = re.compile(rf"(?P<before>(?:.*\.)?(?:{'|'.join(called('stack'))})\.)(?P<number>\d+)(?P<after>\..+)")
FLOATS = {"float32": np.dtype(np.float32), "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}
TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "seed",
    "chat_template",
)
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Input:
    """Layers of a model that go into a slice of the result."""

    model: str
    layers: range
    parameters: Settings


@dataclasses.dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result, made from the same number of layers of each input.

    Attributes:
        base: the layers that changes are relative to, which may be one of the inputs; None if the method needs none.
    """

    inputs: tuple[Input, ...]
    base: Input | None
    parameters: Settings

    @property
    def everyone(self) -> tuple[Input, ...]:
        """The inputs, and the base if it is not one of them."""
        return self.inputs if self.base is None or self.base in self.inputs else (*self.inputs, self.base)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A merge whose settings were read and checked."""

    method: str
    base: str | None
    slices: tuple[Slice, ...]
    parameters: Settings
    dtype: str | None
    tokenizer: str
    seed: int
    chat_template: str | None = None


def read_recipe(recipe: str | Path | Settings) -> Settings:
    """The settings in a YAML file, or those given, checked without opening any model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: settings are unknown, missing or malformed; all are listed.
    """
    settings = recipe if isinstance(recipe, Mapping) else _read(Path(recipe))
    settings, faults = in_own_form(settings)
    _raise(faults + _form_faults(settings))
    return settings


def resolve(settings: Settings, sources: dict[str, Source]) -> Recipe:
    """The recipe of settings from `read_recipe`; opens every model and puts it into `sources`.

    Raises:
        ValueError: models cannot be opened, or the method cannot combine them; all problems are listed.
    """
    faults = []
    method, base = settings["merge_method"], settings.get("base_model")
    for model in models_of(settings):
        if fault := sum_of_adapter(model):
            faults.append(fault)
            continue
        try:
            sources[model] = open_source(model)
        except UserError as error:
            faults.append(f"{model}: {error}")
        else:
            if "quantization_config" in sources[model].config:
                faults.append(f"{model}: is packed; models are combined unpacked")
    _raise(faults)
    needed = base if METHODS[method].base else None
    if "models" in settings:
        slices = [_slice("models", {"sources": settings["models"]}, needed, sources, faults, whole=True)]
    else:
        slices = [
            _slice(f"slices[{i}]", part, needed, sources, faults, whole=False)
            for i, part in enumerate(settings["slices"])
        ]
    _raise(faults + _misfits(method, base, slices))
    chosen = settings.get("tokenizer_source") or base or slices[0].inputs[0].model
    if chosen == "union":
        named = models_of(settings)
        chosen, faults = common_tokenizer([*([base] if base else []), *(model for model in named if model != base)])
        _raise(faults)
    return Recipe(
        method=method,
        base=base,
        slices=tuple(slices),
        parameters=settings.get("parameters") or {},
        dtype=settings.get("out_dtype") or settings.get("dtype"),
        tokenizer=base if chosen == "base" else chosen,
        seed=settings.get("seed", 0),
        chat_template=settings.get("chat_template"),
    )


def models_of(settings: Settings) -> list[str]:
    """Every model that the settings name, the base last."""
    named = [entry["model"] for _, entries in _listed(settings) for entry in entries]
    base = settings.get("base_model")
    return list(dict.fromkeys([*named, *([base] if base else [])]))


def count_layers(source: Source) -> int:
    """The number of the model's layers, from its tensors' names."""
    return 1 + max((int(match["number"]) for match in map(LAYER.fullmatch, source.tensors) if match), default=-1)


def _read(path: Path) -> Settings:
    import yaml

    if not path.is_file():
        raise MissingFileError(f"no recipe {path}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, Mapping):
        raise UserError(f"{path}: found {type(settings).__name__}, expected a mapping with merge_method and models")
    return settings


def _raise(faults: Sequence[str]) -> None:
    if faults:
        raise UserError("the recipe is invalid:\n  " + "\n  ".join(faults))


# ---------------------------------------------------------------- form


def _form_faults(settings: Settings) -> list[str]:
    """What is wrong with the settings, independently of the models."""
    faults = _unknown("", settings, TOP)
    method, base, seed = settings.get("merge_method"), settings.get("base_model"), settings.get("seed", 0)
    known = isinstance(method, str) and method in METHODS
    if not known:
        faults.append(f"merge_method: found {method!r}, expected one of {', '.join(METHODS)}")
    if ("models" in settings) == ("slices" in settings):
        faults.append("models, slices: one of them is required, and only one")
    for name in ("dtype", "out_dtype"):
        if settings.get(name) not in (None, *FLOATS):
            faults.append(f"{name}: found {settings[name]!r}, expected one of {', '.join(FLOATS)}")
    if base is not None and not isinstance(base, str):
        faults.append(f"base_model: found {base!r}, expected a folder or a Hub id")
    if known and METHODS[method].base and not base:
        faults.append(f"base_model: is required by {method}")
    if type(seed) is not int or seed < 0:
        faults.append(f"seed: found {seed!r}, expected a whole number of at least 0")
    template = settings.get("chat_template")
    if template is not None and template != "auto" and not (isinstance(template, str) and "{" in template):
        faults.append(f"chat_template: found {template!r}, expected auto, or the template itself")
    faults += _tokenizer_faults(settings.get("tokenizer_source"), base)
    faults += _list_faults(settings)
    for where, found, of_model in _parameters(settings) if known else ():
        faults += _parameter_faults(where, found, method, of_model=of_model)
    return faults


def _tokenizer_faults(chosen: Any, base: Any) -> list[str]:
    if chosen == "base" and not base:
        return ["tokenizer_source: found 'base', but there is no base_model"]
    if chosen is not None and not isinstance(chosen, str):
        return [f"tokenizer_source: found {chosen!r}, expected base, a folder or a Hub id"]
    return []


def _listed(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Yields (where, entries) for every list of models."""
    if "models" in settings:
        yield "models", settings["models"]
    slices = settings.get("slices")
    for i, part in enumerate(slices if isinstance(slices, list) else ()):
        yield f"slices[{i}].sources", part.get("sources") if isinstance(part, Mapping) else part


def _list_faults(settings: Settings) -> list[str]:
    """What is wrong with the lists of models."""
    faults = []
    slices = settings.get("slices")
    if "slices" in settings and not (isinstance(slices, list) and slices):
        faults.append(f"slices: found {slices!r}, expected a list of slices")
    for i, part in enumerate(slices if isinstance(slices, list) else ()):
        if isinstance(part, Mapping):
            faults += _unknown(f"slices[{i}].", part, ("sources", "parameters"))
    for where, entries in _listed(settings):
        if not isinstance(entries, list) or not entries:
            faults.append(f"{where}: found {entries!r}, expected a list of models")
            continue
        ranged = where != "models"
        for i, entry in enumerate(entries):
            if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
                faults.append(f"{where}[{i}]: found {entry!r}, expected a mapping with model")
                continue
            faults += _unknown(f"{where}[{i}].", entry, ("model", "parameters", *(("layer_range",) if ranged else ())))
            if ranged and not _is_range(found := entry.get("layer_range")):
                faults.append(f"{where}[{i}].layer_range: found {found!r}, expected [first, last + 1]")
    return faults


def _is_range(found: Any) -> bool:
    return isinstance(found, list | tuple) and len(found) == 2 and all(type(number) is int for number in found)


def _unknown(where: str, found: Settings, known: Sequence[str]) -> list[str]:
    return [f"{where}{key}: is unknown; expected one of {', '.join(known)}" for key in found if key not in known]


# ---------------------------------------------------------------- parameters


def _parameters(settings: Settings) -> Iterator[tuple[str, Any, bool]]:
    """Yields (where, parameters, whether they are a single model's) for every place that can have some."""
    yield "parameters", settings.get("parameters"), False
    slices = settings.get("slices")
    for i, part in enumerate(slices if isinstance(slices, list) else ()):
        if isinstance(part, Mapping):
            yield f"slices[{i}].parameters", part.get("parameters"), False
    for where, entries in _listed(settings):
        for i, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, Mapping):
                yield f"{where}[{i}].parameters", entry.get("parameters"), True


def _parameter_faults(where: str, found: Any, method: str, *, of_model: bool) -> list[str]:
    if found is None:
        return []
    if not isinstance(found, Mapping):
        return [f"{where}: found {found!r}, expected a mapping"]
    of_models, of_all = METHODS[method].of_models, METHODS[method].of_all
    known = {**of_models, **({} if of_model else of_all)}
    faults = []
    for name, value in found.items():
        place = f"{where}.{name}"
        if name in known:
            faults += _value_faults(place, name, value)
        elif name in of_all:
            faults.append(f"{place}: applies to all models together: give it in the recipe's or the slice's parameters")
        elif name == "rescale":
            faults.append(f"{place}: is not supported for {method}; leave it out")
        else:
            faults.append(f"{place}: is unknown to {method}, which reads {', '.join(known) or 'none'}")
    return faults


def _value_faults(place: str, name: str, found: Any) -> list[str]:
    """What is wrong with a number, a list of numbers along the layers, or a list of filters with one of these each."""
    found = [found] if isinstance(found, Mapping) else found
    if not isinstance(found, list) or not any(isinstance(item, Mapping) for item in found):
        return _number_faults(place, name, found)
    faults = []
    for item in found:
        if not isinstance(item, Mapping) or "value" not in item or not isinstance(item.get("filter"), str | None):
            faults.append(f"{place}: found {item!r}, expected a mapping with value, and filter, a part of names")
        else:
            faults += _unknown(f"{place}.", item, ("value", "filter")) + _number_faults(place, name, item["value"])
    return faults


def _number_faults(place: str, name: str, found: Any) -> list[str]:
    numbers = found if isinstance(found, list) else [found]
    if not numbers or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        return [f"{place}: found {found!r}, expected a number, or a list of them along the layers"]
    if name == "density" and not all(0 <= number <= 1 for number in numbers):
        return [f"{place}: found {found!r}, expected a number in [0, 1]"]
    return []


# ---------------------------------------------------------------- models


def _slice(
    where: str, part: Settings, base: str | None, sources: Mapping[str, Source], faults: list[str], *, whole: bool
) -> Slice:
    inputs = []
    for number, entry in enumerate(part["sources"]):
        model, count = entry["model"], count_layers(sources[entry["model"]])
        first, last = (0, count) if whole else entry["layer_range"]
        if not 0 <= first < last <= count:
            place = f"{where}.sources[{number}].layer_range"
            faults.append(f"{place}: found [{first}, {last}], {model} has layers 0 to {count}")
        inputs.append(Input(model, range(first, last), entry.get("parameters") or {}))
    count = count_layers(sources[base]) if base else 0
    own = _base(where, base, inputs, count, faults, whole=whole) if base else None
    found = Slice(tuple(inputs), own, part.get("parameters") or {})
    if len({len(input.layers) for input in found.everyone}) > 1:
        faults.append(f"{where}: its models have different numbers of layers: give slices with layer_range")
    return found


def _base(where: str, base: str, inputs: Sequence[Input], count: int, faults: list[str], *, whole: bool) -> Input:
    """The base's layers as listed; if it is not listed, those with the same numbers as the inputs'."""
    if listed := next((input for input in inputs if input.model == base), None):
        return listed
    layers = range(count) if whole else inputs[0].layers
    if not whole and any(input.layers != layers for input in inputs):
        faults.append(
            f"{where}: does not list base_model, and its models take different layers: list it, with the layers that "
            "theirs were changed from"
        )
    elif layers.stop > count:
        faults.append(
            f"{where}: takes layers [{layers.start}, {layers.stop}] of base_model, and {base} has layers 0 to {count}"
        )
    return Input(base, layers, {})


def _misfits(method: str, base: str | None, slices: Sequence[Slice]) -> list[str]:
    """Why the method cannot combine these models."""
    faults = []
    for part in slices:
        others = [input.model for input in part.inputs if input.model != base]
        if method == "slerp" and len(others) != 1:
            faults.append(f"slerp goes from base_model to one other, found {len(others)}: {', '.join(others)}")
        if method == "passthrough" and len(part.inputs) != 1:
            faults.append(f"passthrough takes one model a slice, found {len(part.inputs)}")
        if METHODS[method].base and not others:
            faults.append(f"{method} needs models besides base_model")
        if method == "model_stock" and len(others) < 2:
            faults.append(f"model_stock needs two models or more besides base_model, found {len(others)}")
        everyone = [input.model for input in part.inputs]
        if len(set(everyone)) < len(everyone):
            faults.append(f"a model is named twice in one slice: {', '.join(everyone)}")
    return faults
