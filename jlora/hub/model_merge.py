"""Whole models combined tensor by tensor, from a recipe written as mergekit's are."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.hub.export import SHARD_BYTES, Entry, write_folder
from jlora.hub.folder import refuse_inputs
from jlora.hub.merge_methods import METHODS, Method
from jlora.hub.merge_recipe import FLOATS, LAYER, Input, Recipe, Slice, count_layers, models_of, read_recipe, resolve
from jlora.hub.source import Source
from jlora.hub.tokenizer import load_tokenizer
from jlora.hub.weights import DTYPES

# What comes before the layers; other tensors outside of them come after.
EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|embed_in|wte|wpe)\..+")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the result: where each input's lies, and how far along its slice it is: 0 first layer and embeddings,
    1 last layer and what comes after it.
    """

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
        ValueError: settings that do not hold, models that do not fit each other, or `out` is one of them; all are
            listed, nothing is written.
    """
    settings = read_recipe(recipe)
    refuse_inputs(out, {f"the recipe's {model}": model for model in models_of(settings)})
    sources: dict[str, Source] = {}
    plan = resolve(settings, sources)
    tensors = _tensors(plan, sources)
    _require_same_shapes(tensors, plan.base, sources)
    method = METHODS[plan.method]
    fixed = _settings(tensors, plan, method)

    def make(number: int, tensor: _Tensor, of_models: list[dict], of_all: dict) -> dict[str, np.ndarray]:
        given = {input.model: sources[input.model].read(name) for input, name in tensor.members}
        base = None if tensor.base is None else np.asarray(sources[plan.base].read(tensor.base))
        arrays = [np.asarray(value, np.float32) for value in given.values()]
        draws = np.random.Generator(np.random.PCG64([plan.seed, zlib.crc32(tensor.name.encode())]))
        whole = None if base is None else base.astype(np.float32)
        made = method.combine(arrays, whole, of_models, of_all, draws).astype(_dtype(tensor, plan, sources))
        progress(number, len(tensors))
        return {tensor.name: made}

    entries = [
        Entry(int(np.prod(_shape(chosen[0], sources))) * 4, functools.partial(make, number, *chosen))
        for number, chosen in enumerate(fixed, start=1)
    ]
    tokenizer = load_tokenizer(plan.tokenizer)
    write_folder(out, _configs(plan, sources, tensors), entries, tokenizer, shard_bytes)


def _tensors(plan: Recipe, sources: Mapping[str, Source]) -> list[_Tensor]:
    """Every tensor of the result, in order.

    Raises:
        ValueError: tensors that one of the models has and another has not; all are listed.
    """
    found: list[_Tensor] = []
    first, last = plan.slices[0], plan.slices[-1]
    for name in sources[first.inputs[0].model].tensors:
        if not LAYER.fullmatch(name):
            part, along = (first, 0.0) if EMBEDDING.fullmatch(name) else (last, 1.0)
            found.append(_tensor(name, [name] * len(part.inputs), name, along, part, plan))
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


def _dtype(tensor: _Tensor, plan: Recipe, sources: Mapping[str, Source]) -> np.dtype:
    """What the tensor is rounded to: where the recipe does not say, what the base's, or the first model's, is stored
    in; float32 for the packed blocks of a GGUF file.
    """
    if plan.dtype:
        return FLOATS[plan.dtype]
    input, name = tensor.members[0]
    model, name = (input.model, name) if tensor.base is None else (plan.base, tensor.base)
    return DTYPES.get(sources[model].tensors[name].dtype, np.dtype(np.float32))


def _settings(tensors: Sequence[_Tensor], plan: Recipe, method: Method) -> list[tuple[_Tensor, list[dict], dict]]:
    """(tensor, each model's settings, those of the whole) for every tensor.

    Raises:
        ValueError: settings that are required and not given, or that do not go together; each with the first tensor
            that they are wrong for.
    """
    found = []
    faults: dict[str, str] = {}
    for tensor in tensors:
        of_models = [
            {name: _setting(name, default, tensor, plan, input, member) for name, default in method.of_models.items()}
            for input, member in tensor.members
        ]
        of_all = {name: _setting(name, default, tensor, plan) for name, default in method.of_all.items()}
        for fault in _missing(tensor, plan, of_models, of_all) or method.faults(of_models, of_all):
            faults.setdefault(fault, tensor.name)
        found.append((tensor, of_models, of_all))
    if faults:
        lines = [f"{fault} (for {name})" for fault, name in faults.items()]
        raise ValueError("the recipe does not hold:\n  " + "\n  ".join(lines))
    return found


def _setting(
    name: str, default: Any, tensor: _Tensor, plan: Recipe, input: Input | None = None, member: str | None = None
) -> Any:
    """The parameter's value for a tensor: the model's own before the slice's before the recipe's."""
    for place in (input.parameters if input else {}, tensor.slice.parameters, plan.parameters):
        if name in place and (value := _value(member or tensor.name, place[name], tensor.along)) is not None:
            return value
    return default


def _missing(tensor: _Tensor, plan: Recipe, of_models: Sequence[dict], of_all: dict) -> list[str]:
    pairs = zip(tensor.members, of_models, strict=True)
    missing = [f"{name} of {input.model}" for (input, _), own in pairs for name in own if own[name] is None]
    missing += [name for name, value in of_all.items() if value is None]
    return [f"parameters.{name}: is required by {plan.method}" for name in missing]


def _value(name: str, setting: Any, along: float) -> Any:
    """A number itself; of a list of numbers the one so far along it; of filters the value of the first that fits."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not isinstance(setting[0], Mapping):
        place = along * (len(setting) - 1)
        low, share = int(place), place - int(place)
        return (1 - share) * setting[low] + share * setting[min(len(setting) - 1, low + 1)]
    fits = (item for item in setting if item.get("filter") in (None, "", "*") or item["filter"] in name)
    chosen = next(fits, None)
    return None if chosen is None else _value(name, chosen["value"], along)


def _configs(
    plan: Recipe, sources: Mapping[str, Source], tensors: Sequence[_Tensor]
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """config.json with as many layers as there are now, and generation_config.json."""
    model = plan.base or plan.slices[0].inputs[0].model
    config = dict(sources[model].config)
    config.pop("torch_dtype", None)
    count = count_layers(sources[model])
    inputs = [_input_of(part, model) for part in plan.slices]
    faults = []
    for key, value in config.items():
        if key in ("num_hidden_layers", "n_layer"):
            config[key] = sum(len(input.layers) for input in inputs)
        elif isinstance(value, list) and len(value) == count:  # one entry a layer
            own = {input.model: sources[input.model].config.get(key) for input in inputs}
            if lacking := [name for name in own if not _has_layers(own[name], count_layers(sources[name]))]:
                faults.append(f"{key}: {model} has one entry a layer, {', '.join(lacking)} has not")
            else:
                config[key] = [own[input.model][layer] for input in inputs for layer in input.layers]
    if faults:
        raise ValueError("the models' config.json differ in what they hold:\n  " + "\n  ".join(faults))
    largest = max(tensors, key=lambda tensor: int(np.prod(_shape(tensor, sources))))
    config["dtype"] = _dtype(largest, plan, sources).name
    return config, sources[model].generation_config


def _has_layers(found: Any, count: int) -> bool:
    return isinstance(found, list) and len(found) == count


def _input_of(part: Slice, model: str) -> Input:
    return next((input for input in part.inputs if input.model == model), part.inputs[0])
