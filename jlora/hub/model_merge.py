"""Whole models combined tensor by tensor, from a recipe written as mergekit's are."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jlora.hub.export import SHARD_BYTES, Entry, write_folder
from jlora.hub.source import Source, open_source
from jlora.hub.tokenizer import load_tokenizer
from jlora.hub.weights import DTYPES
from jlora.lora.task_arithmetic import RULES, Rule, add_changes

LAYER = re.compile(r"(?P<before>(?:.*\.)?(?:layers|h)\.)(?P<number>\d+)(?P<after>\..+)")
# What comes before the layers; other tensors outside of them come after.
EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|embed_in|wte|wpe)\..+")
FLOATS = {"float32": np.dtype(np.float32), "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}

Value = int | float
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method reads, and what it makes of tensors.

    Attributes:
        of_models: settings that every model has, with their defaults (None: required).
        of_all: settings of the whole.
        combine: (tensors by model, the base's or None, settings by model, settings of the whole, random numbers).
        base: whether it needs base_model.
    """

    of_models: Mapping[str, Value | None]
    of_all: Mapping[str, Value | bool | None]
    combine: Callable[..., np.ndarray]
    base: bool


@dataclasses.dataclass(frozen=True)
class Input:
    """Layers of a model that go into a slice of the result."""

    model: str
    layers: range
    parameters: Settings


@dataclasses.dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result, made of as many of each input."""

    inputs: tuple[Input, ...]
    parameters: Settings


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A merge that was read and checked."""

    method: str
    base: str | None
    slices: tuple[Slice, ...]
    parameters: Settings
    dtype: str | None
    tokenizer: str
    seed: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the result: where each input's lies, and how far along its slice it is (0 first, 1 last)."""

    name: str
    members: tuple[tuple[Input, str], ...]
    base: str | None
    along: float
    slice: Slice


def merge_models(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the model that a recipe describes as a Hugging Face folder, complete or not at all.

    A recipe is a YAML file (or the mapping in one) as mergekit reads it: merge_method, base_model, models or slices
    with layer_range, parameters (numbers, gradients over layers, filters by tensor name), dtype or out_dtype,
    tokenizer_source. The methods and their formulas are mergekit's, computed in float32 and rounded once; but for
    DARE's factor, which is the paper's 1 / density (mergekit's keeps the sum of absolute values):

        linear           Σ weight · W / Σ weight, or without the division (normalize: false) (model soups)
        slerp            base and one more along the arc between them, by t
        task_arithmetic  base + Σ weight · (W - base)                     (Ilharco et al. 2023)
        ties             the largest `density` of the changes, where signs agree, averaged (Yadav et al. 2023)
        dare_linear, dare_ties  a random `density` of the changes         (Yu et al. 2024)
        passthrough      layers of several models on top of each other

    A tensor of each model is held at a time, and the file that is being written: `shard_bytes` bounds that.

    Args:
        progress: is told how many tensors are done, and of how many.

    Raises:
        ValueError: settings that do not hold, or models that do not fit each other; all are listed, nothing is written.
    """
    settings = recipe if isinstance(recipe, Mapping) else _read(Path(recipe))
    sources: dict[str, Source] = {}
    plan = _resolve(settings, sources)
    tensors = _tensors(plan, sources)
    _require_same_shapes(tensors, plan.base, sources)
    method = METHODS[plan.method]
    fixed = [(tensor, *_settings_of(tensor, plan, method)) for tensor in tensors]

    def make(number: int, tensor: _Tensor, of_models: list[dict], of_all: dict) -> dict[str, np.ndarray]:
        given = {input.model: sources[input.model].read(name) for input, name in tensor.members}
        base = None if tensor.base is None else np.asarray(sources[plan.base].read(tensor.base))
        dtype = (
            FLOATS[plan.dtype] if plan.dtype else np.asarray(next(iter(given.values())) if base is None else base).dtype
        )
        arrays = [np.asarray(value, np.float32) for value in given.values()]
        draws = np.random.Generator(np.random.PCG64([plan.seed, zlib.crc32(tensor.name.encode())]))
        whole = None if base is None else base.astype(np.float32)
        made = method.combine(arrays, whole, of_models, of_all, draws).astype(dtype)
        progress(number, len(tensors))
        return {tensor.name: made}

    entries = [
        Entry(int(np.prod(_shape(chosen[0], sources))) * 4, functools.partial(make, number, *chosen))
        for number, chosen in enumerate(fixed, start=1)
    ]
    tokenizer = load_tokenizer(plan.tokenizer)
    write_folder(out, _configs(plan, sources, tensors), entries, tokenizer, shard_bytes)


# ---------------------------------------------------------------- methods


def _linear(
    arrays: Sequence[np.ndarray], base: np.ndarray | None, of_models: Sequence[dict], of_all: dict, draws: Any
) -> Float[np.ndarray, "..."]:
    total = sum(array * np.float32(own["weight"]) for array, own in zip(arrays, of_models, strict=True))
    return total / np.float32(sum(own["weight"] for own in of_models)) if of_all["normalize"] else total


def _slerp(
    arrays: Sequence[np.ndarray], base: np.ndarray, of_models: Sequence[dict], of_all: dict, draws: Any
) -> Float[np.ndarray, "..."]:
    """Shoemake 1985; almost parallel tensors are interpolated along the line, as mergekit does."""
    (other,), t = arrays, of_all["t"]
    lengths = [max(float(np.linalg.norm(array)), 1e-8) for array in (base, other)]
    cosine = float(np.sum((base / np.float32(lengths[0])) * (other / np.float32(lengths[1]))))
    if abs(cosine) > 0.9995:
        return np.float32(1 - t) * base + np.float32(t) * other
    angle = np.arccos(cosine)
    left, right = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    return np.float32(left) * base + np.float32(right) * other


def _passthrough(
    arrays: Sequence[np.ndarray], base: np.ndarray | None, of_models: Sequence[dict], of_all: dict, draws: Any
) -> Float[np.ndarray, "..."]:
    return arrays[0] * np.float32(of_models[0]["scale"])


def _changes(rule: Rule) -> Callable[..., np.ndarray]:
    """What `rule` makes of changes of the base."""

    def combine(
        arrays: Sequence[np.ndarray], base: np.ndarray, of_models: Sequence[dict], of_all: dict, draws: Any
    ) -> Float[np.ndarray, "..."]:
        change = add_changes(
            [array - base for array in arrays],
            [own["weight"] for own in of_models],
            dataclasses.replace(rule, average=bool(of_all["normalize"])),
            density=[own["density"] for own in of_models],
            generator=draws,
        )
        return base + change * np.float32(of_all["lambda"])

    return combine


def _of_changes(rule: Rule) -> Method:
    of_all = {"normalize": rule.average, "lambda": 1.0}
    return Method({"weight": None, "density": 1.0}, of_all, _changes(rule), base=True)


METHODS = {
    "linear": Method({"weight": None}, {"normalize": True}, _linear, base=False),
    "slerp": Method({}, {"t": None}, _slerp, base=True),
    "task_arithmetic": _of_changes(RULES["linear"]),
    "ties": _of_changes(RULES["ties"]),
    "dare_linear": _of_changes(RULES["dare_linear"]),
    "dare_ties": _of_changes(RULES["dare_ties"]),
    "passthrough": Method({"scale": 1.0}, {}, _passthrough, base=False),
}


# ---------------------------------------------------------------- the recipe

TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source", "seed")


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path}: found {type(settings).__name__}, expected a mapping with merge_method and models")
    return settings


def _resolve(settings: Mapping[str, Any], sources: dict[str, Source]) -> Recipe:
    """The recipe, with every model opened into `sources`."""
    faults = _unknown("", settings, TOP)
    method = settings.get("merge_method")
    if method not in METHODS:
        faults.append(f"merge_method: found {method!r}, expected one of {', '.join(METHODS)}")
    if ("models" in settings) == ("slices" in settings):
        faults.append("models, slices: one of them is required, and only one")
    for name in ("dtype", "out_dtype"):
        if settings.get(name) not in (None, *FLOATS):
            faults.append(f"{name}: found {settings[name]!r}, expected one of {', '.join(FLOATS)}")
    base = settings.get("base_model")
    if method in METHODS and METHODS[method].base and not base:
        faults.append(f"base_model: is required by {method}")
    named, malformed = _named(settings)
    faults += malformed
    for model in dict.fromkeys([*named, *([str(base)] if base else [])]):
        try:
            sources[model] = open_source(model)
        except (ValueError, FileNotFoundError) as error:
            faults.append(f"{model}: {error}")
        else:
            if "quantization_config" in sources[model].config:
                faults.append(f"{model}: is packed; models are combined unpacked")
    slices: list[Slice] = []
    if not faults:
        if "models" in settings:
            slices = [_slice("models", {"sources": settings["models"]}, sources, faults, whole=True)]
        else:
            slices = [
                _slice(f"slices[{i}]", part, sources, faults, whole=False) for i, part in enumerate(settings["slices"])
            ]
        faults += _misfits(method, base, slices)
    if faults:
        raise ValueError("the recipe does not hold:\n  " + "\n  ".join(faults))
    chosen = settings.get("tokenizer_source") or base or slices[0].inputs[0].model
    return Recipe(
        method=method,
        base=str(base) if base else None,
        slices=tuple(slices),
        parameters=settings.get("parameters") or {},
        dtype=settings.get("out_dtype") or settings.get("dtype"),
        tokenizer=str(base) if chosen == "base" else str(chosen),
        seed=int(settings.get("seed", 0)),
    )


def _named(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(the models that go in, faults in how they are listed)."""
    slices = settings.get("slices", [])
    parts = {"models": settings["models"]} if "models" in settings else {}
    if isinstance(slices, list):
        parts |= {
            f"slices[{i}].sources": part.get("sources") if isinstance(part, Mapping) else part
            for i, part in enumerate(slices)
        }
    faults = [] if isinstance(slices, list) else [f"slices: found {slices!r}, expected a list"]
    named = []
    for where, entries in parts.items():
        if not isinstance(entries, list) or not entries:
            faults.append(f"{where}: found {entries!r}, expected a list of models")
            continue
        for i, entry in enumerate(entries):
            if isinstance(entry, Mapping) and isinstance(entry.get("model"), str):
                named.append(entry["model"])
            else:
                faults.append(f"{where}[{i}]: found {entry!r}, expected a mapping with model")
    return named, faults


def _slice(where: str, part: Any, sources: Mapping[str, Source], faults: list[str], *, whole: bool) -> Slice:
    faults += _unknown(f"{where}.", part, ("sources", "parameters"))
    inputs = []
    for number, entry in enumerate(part["sources"]):
        place = f"{where}[{number}]" if whole else f"{where}.sources[{number}]"
        faults += _unknown(f"{place}.", entry, ("model", "parameters", *(() if whole else ("layer_range",))))
        model = str(entry["model"])
        layers = range(_layers(sources[model]))
        if not whole:
            first, last = (entry.get("layer_range") or (0, 0))[:2]
            if not 0 <= first < last <= len(layers):
                faults.append(f"{place}.layer_range: found [{first}, {last}], {model} has layers 0 to {len(layers)}")
            layers = range(first, last)
        inputs.append(Input(model, layers, entry.get("parameters") or {}))
    if len({len(input.layers) for input in inputs}) > 1:
        faults.append(f"{where}: its models have different numbers of layers: give slices with layer_range")
    return Slice(tuple(inputs), part.get("parameters") or {})


def _misfits(method: str, base: Any, slices: Sequence[Slice]) -> list[str]:
    """What a method cannot do with these models."""
    faults = []
    for part in slices:
        others = [input.model for input in part.inputs if input.model != base]
        if method == "slerp" and len(others) != 1:
            faults.append(f"slerp goes from base_model to one other, found {len(others)}: {', '.join(others)}")
        if method == "passthrough" and len(part.inputs) != 1:
            faults.append(f"passthrough takes one model a slice, found {len(part.inputs)}")
        if METHODS[method].base and not others:
            faults.append(f"{method} needs models besides base_model")
        everyone = [input.model for input in part.inputs]
        if len(set(everyone)) < len(everyone):
            faults.append(f"a model is named twice in one slice: {', '.join(everyone)}")
    return faults


def _unknown(where: str, found: Any, known: Sequence[str]) -> list[str]:
    if not isinstance(found, Mapping):
        return [f"{where or 'recipe'}: found {found!r}, expected a mapping"]
    return [f"{where}{key}: is not known here; known are {', '.join(known)}" for key in found if key not in known]


def _layers(source: Source) -> int:
    return 1 + max((int(match["number"]) for match in map(LAYER.fullmatch, source.tensors) if match), default=-1)


# ---------------------------------------------------------------- tensors


def _tensors(plan: Recipe, sources: Mapping[str, Source]) -> list[_Tensor]:
    """Every tensor of the result, in order.

    Raises:
        ValueError: tensors that one of the models has and another has not; all are listed.
    """
    found: list[_Tensor] = []
    first, last = plan.slices[0], plan.slices[-1]
    for name in sources[first.inputs[0].model].tensors:
        if not LAYER.fullmatch(name):
            part = first if EMBEDDING.fullmatch(name) else last
            found.append(_tensor(name, [name] * len(part.inputs), name, 0.0, part, plan))
    offset = 0
    for part in plan.slices:
        count = len(part.inputs[0].layers)
        for index in range(count):
            along = index / (count - 1) if count > 1 else 1.0
            numbers = [input.layers[index] for input in part.inputs]
            for name in sources[part.inputs[0].model].tensors:
                match = LAYER.fullmatch(name)
                if match and int(match["number"]) == numbers[0]:
                    before, after = match["before"], match["after"]
                    names = [f"{before}{number}{after}" for number in numbers]
                    base = _base_name(part, plan, names, f"{before}{offset + index}{after}")
                    found.append(_tensor(f"{before}{offset + index}{after}", names, base, along, part, plan))
        offset += count
    missing = [
        f"{model} has no {name}"
        for tensor in found
        for model, name in [*((input.model, name) for input, name in tensor.members), (plan.base, tensor.base)]
        if model is not None and name is not None and name not in sources[model].tensors
    ]
    extra = [
        f"only {model} has {name}"
        for model in dict.fromkeys(input.model for input in (*first.inputs, *last.inputs))
        for name in sources[model].tensors
        if not LAYER.fullmatch(name) and name not in {tensor.name for tensor in found}
    ]
    if missing or extra:
        raise ValueError("the models do not have the same tensors:\n  " + "\n  ".join(dict.fromkeys(missing + extra)))
    return found


def _base_name(part: Slice, plan: Recipe, names: Sequence[str], own: str) -> str:
    """The base's tensor: that of the layers which the slice takes of it, otherwise the one of the result's name."""
    return next((name for input, name in zip(part.inputs, names, strict=True) if input.model == plan.base), own)


def _tensor(name: str, names: Sequence[str], base: str, along: float, part: Slice, plan: Recipe) -> _Tensor:
    needs_base = METHODS[plan.method].base
    members = tuple(
        (input, member)
        for input, member in zip(part.inputs, names, strict=True)
        if not (needs_base and input.model == plan.base)
    )
    return _Tensor(name, members, base if needs_base else None, along, part)


def _require_same_shapes(tensors: Sequence[_Tensor], base: str | None, sources: Mapping[str, Source]) -> None:
    faults = []
    for tensor in tensors:
        shapes = {input.model: sources[input.model].tensors[name].shape for input, name in tensor.members}
        if tensor.base is not None:
            shapes[base] = sources[base].tensors[tensor.base].shape
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{shape} in {model}" for model, shape in shapes.items())
            faults.append(f"{tensor.name}: {found}")
    if faults:
        raise ValueError("the models' tensors differ in shape:\n  " + "\n  ".join(faults))


def _shape(tensor: _Tensor, sources: Mapping[str, Source]) -> tuple[int, ...]:
    input, name = tensor.members[0]
    return sources[input.model].tensors[name].shape


def _settings_of(tensor: _Tensor, plan: Recipe, method: Method) -> tuple[list[dict], dict]:
    """(each model's settings, those of the whole) for a tensor.

    Raises:
        ValueError: one that is required and not given.
    """

    def setting(name: str, default: Any, input: Input | None = None, member: str = tensor.name) -> Any:
        for place in (input.parameters if input else {}, tensor.slice.parameters, plan.parameters):
            if name in place and (value := _value(member, place[name], tensor.along)) is not None:
                if not isinstance(value, int | float):
                    raise ValueError(f"parameters.{name}: found {value!r}, expected a number (for {member})")
                return value
        if default is None:
            whose = f" of {input.model}" if input else ""
            raise ValueError(f"parameters.{name}{whose}: is required by {plan.method} (for {member})")
        return default

    of_models = [
        {name: setting(name, default, input, member) for name, default in method.of_models.items()}
        for input, member in tensor.members
    ]
    for own in of_models:
        if not 0 < own.get("density", 1) <= 1:
            raise ValueError(f"parameters.density: found {own['density']}, expected a number in (0, 1]")
    return of_models, {name: setting(name, default) for name, default in method.of_all.items()}


def _value(name: str, setting: Any, along: float) -> Any:
    """A number itself; of a list of numbers the one so far along it; of filters the value of the first that fits."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if all(isinstance(item, int | float) for item in setting):
        place = along * (len(setting) - 1)
        low, share = int(place), place - int(place)
        return (1 - share) * setting[low] + share * setting[min(len(setting) - 1, low + 1)]
    for item in setting:
        if not isinstance(item, Mapping) or "value" not in item:
            raise ValueError(f"parameters: found {item!r}, expected a mapping with value, and filter (for {name})")
        if not item.get("filter") or item["filter"] == "*" or item["filter"] in name:
            return _value(name, item["value"], along)
    return None


def _configs(
    plan: Recipe, sources: Mapping[str, Source], tensors: Sequence[_Tensor]
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """config.json with as many layers as there are now, and generation_config.json."""
    model = plan.base or plan.slices[0].inputs[0].model
    config = dict(sources[model].config)
    config.pop("torch_dtype", None)
    count = _layers(sources[model])
    inputs = [_input_of(part, model) for part in plan.slices]
    for key, value in config.items():
        if key in ("num_hidden_layers", "n_layer"):
            config[key] = sum(len(input.layers) for input in inputs)
        elif isinstance(value, list) and len(value) == count:  # one entry a layer
            config[key] = [sources[input.model].config[key][layer] for input in inputs for layer in input.layers]
    largest = max(tensors, key=lambda tensor: int(np.prod(_shape(tensor, sources))))
    stored = sources[model].tensors.get(largest.name) or next(iter(sources[model].tensors.values()))
    config["dtype"] = plan.dtype or DTYPES.get(stored.dtype, np.dtype(np.float32)).name
    return config, sources[model].generation_config


def _input_of(part: Slice, model: str) -> Input:
    return next((input for input in part.inputs if input.model == model), part.inputs[0])
