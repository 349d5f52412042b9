"""Combines whole models tensor by tensor, from a recipe in mergekit's format."""

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jlora.errors import UserError, number_of
from jlora.families import called
from jlora.families.fields import HARMLESS
from jlora.hub.cards import model_card, shown
from jlora.hub.checkpoints.beside import beside_of, half_of
from jlora.hub.checkpoints.folder import refuse_inputs
from jlora.hub.checkpoints.names import is_harmless
from jlora.hub.checkpoints.source import Source
from jlora.hub.checkpoints.weights import DTYPES
from jlora.hub.checkpoints.writing import SHARD_BYTES, Entry, write_folder
from jlora.hub.recipes.methods import METHODS
from jlora.hub.recipes.recipe import FLOATS, LAYER, Input, Recipe, Slice, count_layers, models_of, read_recipe, resolve
from jlora.hub.recipes.spelling import set_template
from jlora.hub.tokenizer import load_tokenizer
from jlora.models import ModelConfig, build

# Modules that come before the layers; others outside of them come after.
EMBEDDINGS = frozenset(called("embedding", "positions"))
# Settings that change no logits, or that are set again for the result.
IDLE = {
    *HARMLESS,
    "eos_token_id",
    "max_position_embeddings",
    "num_hidden_layers",
    "n_layer",
    "auto_map",
    "tokenizer_class",
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the result.

    Attributes:
        members: (input, name of its tensor), for all inputs but the base.
        base: the name of the base's tensor; None if there is no base.
        along: the position along the slice: 0 for its first layer and embeddings, 1 for its last layer and later ones.
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
    force: bool = False,
) -> None:
    """Writes the model that a recipe describes as a Hugging Face folder, complete or not at all.

    A recipe is a YAML file (or the mapping in one) as mergekit reads it: merge_method, base_model, models or slices
    with layer_range, parameters (numbers, gradients over layers, filters by tensor name), dtype or out_dtype,
    tokenizer_source. The methods and their formulas are mergekit's, computed in float32 and rounded once, except for
    DARE's and DELLA's factor, which is the papers' 1 / density (mergekit's keeps the sum of absolute values):

        linear           Σ weight · W / Σ weight, or without the division (normalize: false) (model soups)
        slerp            base and one more along the arc between them, by t
        task_arithmetic  base + Σ weight · (W - base)                     (Ilharco et al. 2023)
        ties             the largest `density` of the changes, where signs agree, averaged (Yadav et al. 2023)
        dare_linear, dare_ties  a random `density` of the changes         (Yu et al. 2024)
        della_linear, della     the same, but large changes of a row are kept more often: density ± epsilon by rank,
                                each divided by how often it is kept      (Deep et al. 2024)
        model_stock      t · mean + (1 - t) · base, t = N cos θ / (1 + (N - 1) cos θ), θ the mean angle between the
                         changes of N models                              (Jang et al. 2024)
        passthrough      layers of several models on top of each other

    The result has the settings of base_model, or of the first model. Each layer of each model must compute in the
    result what it computed before: everything that `jlora.models.ModelConfig` reads from config.json is compared
    (positions, epsilons, heads, windows of single layers, …). Other settings may differ (dtype, special tokens,
    max_position_embeddings unless positions depend on it), and so may the vocabulary of a model that gives only layers
    in the middle. If jlora does not compute a model, config.json itself is compared, except for fields that change no
    logits in any family; a warning names fields that only one of the models has. All models must have the same tensors,
    except for buffers that every loader recomputes and copies of tied embeddings.

    If a slice does not list base_model, changes are relative to the base's layers with the same numbers as the slice's.

    Of models that also see or hear, the language models are combined. The other parts are copied from base_model, or
    from the first model; other models' are not read.

    Memory holds one tensor of each model and the file that is being written, which `shard_bytes` bounds.

    Args:
        recipe: the path of a YAML file, or a mapping.
        out: the folder to write.
        shard_bytes: the most bytes of tensors in one file.
        progress: called with (number of tensors done, total).
        force: also replace a model that jlora did not write.

    Raises:
        ValueError: settings are invalid, models do not fit each other, or `out` is one of them; all problems are
            listed, and nothing is written.
        FileNotFoundError: there is no such recipe.
        FileExistsError: `out` holds something other than a model, or one that jlora did not write.
    """
    settings = read_recipe(recipe)
    refuse_inputs(out, {f"the recipe's {model}": model for model in models_of(settings)})
    sources: dict[str, Source] = {}
    plan = resolve(settings, sources)
    config = _config(plan, sources)
    _require_one_architecture(config, plan, sources)
    tensors = _tensors(plan, sources)
    _require_same_shapes(tensors, plan.base, sources)
    fixed = _settings(tensors, plan)
    reference = sources[_reference(plan)]
    others = beside_of(reference) if half_of(reference.config) else None

    def make(number: int, tensor: _Tensor, of_models: list[dict], of_all: dict) -> dict[str, np.ndarray]:
        made = _combined(tensor, of_models, of_all, plan, sources)
        progress(number, len(tensors))
        return {others.name(tensor.name) if others else tensor.name: made}

    entries = [
        Entry(int(np.prod(_shape(chosen[0], sources))) * 4, functools.partial(make, number, *chosen))
        for number, chosen in enumerate(fixed, start=1)
    ]
    tokenizer = load_tokenizer(plan.tokenizer)
    set_template(tokenizer, plan.chat_template, models_of(settings))
    largest = max(tensors, key=lambda tensor: int(np.prod(_shape(tensor, sources))))
    config = config | {"dtype": _dtype(largest, plan, sources).name}
    card = model_card(out, models_of(settings), _how(settings), relation="merge")
    write_folder(out, (config, reference.generation_config), entries, tokenizer, shard_bytes, card, others, force=force)


def _combined(
    tensor: _Tensor, of_models: list[dict], of_all: dict, plan: Recipe, sources: Mapping[str, Source]
) -> np.ndarray:
    """A tensor of the result, computed in float32 and rounded once; what it draws depends on its name and the seed."""
    given = {input.model: sources[input.model].read(name) for input, name in tensor.members}
    arrays = [np.asarray(value, np.float32) for value in given.values()]
    base = None if tensor.base is None else np.asarray(sources[plan.base].read(tensor.base)).astype(np.float32)
    draws = np.random.Generator(np.random.PCG64([plan.seed, zlib.crc32(tensor.name.encode())]))
    made = METHODS[plan.method].combine(arrays, base, of_models, of_all, draws)
    return made.astype(_dtype(tensor, plan, sources))


def _how(settings: Mapping[str, Any]) -> str:
    """The recipe for the model card, without places on this machine."""
    places = {model: shown(model) for model in models_of(settings)}

    def named(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: named(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [named(one) for one in value]
        return places.get(value, value) if isinstance(value, str) else value

    text = yaml.safe_dump(named(settings), sort_keys=False)
    return f"Models combined by this recipe, which mergekit reads too:\n\n```yaml\n{text}```"


def _require_one_architecture(merged: Mapping[str, Any], plan: Recipe, sources: Mapping[str, Source]) -> None:
    """Checks that each layer of each model computes in the result, whose config.json is `merged`, what it did before.

    Raises:
        ValueError: models have other settings; all are listed.
    """
    result, whole = f"the result (settings of {_reference(plan)})", _model_config(merged)
    at_the_ends = {input.model for part in (plan.slices[0], plan.slices[-1]) for input in part.everyone}
    faults = []
    for model, places in _places(plan).items():
        own, count = _model_config(sources[model].config), count_layers(sources[model])
        if whole is None or own is None:
            if lines := _written_differences(sources[_reference(plan)], sources[model]):
                faults.append(f"{result} and {model} differ in config.json:\n  " + "\n  ".join(lines))
            continue
        if own.num_hidden_layers != count:
            faults.append(
                f"{model}: config.json has {number_of(own.num_hidden_layers, 'layer')}, its tensors have {count}"
            )
            continue
        layers = list(whole.layers)
        for place, number in places:
            layers[place] = own.layers[number]
        own = dataclasses.replace(own, num_hidden_layers=len(layers), layers=tuple(layers))
        if model not in at_the_ends:  # only models at the ends give the vocabulary
            own = dataclasses.replace(own, vocab_size=whole.vocab_size, tie_word_embeddings=whole.tie_word_embeddings)
        if whole.inverse_layer_scale and any(place != number for place, number in places):
            faults.append(
                f"{model}: scale_attn_by_inverse_layer_idx: its layers compute by their number, and some move"
            )
        try:
            whole.require_same(own, result, model)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))


def _model_config(config: Mapping[str, Any]) -> ModelConfig | None:
    """The ModelConfig of a config.json; None if jlora does not compute such a model."""
    try:
        return build(dict(config)).config
    except ValueError:
        return None


def _places(plan: Recipe) -> dict[str, list[tuple[int, int]]]:
    """{model: [(layer of the result, layer of the model), ...]}."""
    found: dict[str, list[tuple[int, int]]] = {}
    offset = 0
    for part in plan.slices:
        for input in part.everyone:
            found.setdefault(input.model, []).extend(enumerate(input.layers, start=offset))
        offset += len(part.inputs[0].layers)
    return found


def _written_differences(one: Source, other: Source) -> list[str]:
    """How two config.json differ, except in lists along the layers and in fields that change no logits."""
    ours, theirs = (
        {key: value for key, value in source.config.items() if key not in IDLE and not _has_layers(value, count)}
        for source, count in ((one, count_layers(one)), (other, count_layers(other)))
    )
    shared = sorted(ours.keys() & theirs.keys())
    found = [f"{key}: {ours[key]!r} and {theirs[key]!r}" for key in shared if ours[key] != theirs[key]]
    if (lacking := sorted(ours.keys() ^ theirs.keys())) and not found:
        warnings.warn(
            f"one config.json has {', '.join(lacking)}, another does not: defaults are not compared", stacklevel=4
        )
    return found


def _tensors(plan: Recipe, sources: Mapping[str, Source]) -> list[_Tensor]:
    """Every tensor of the result, in order.

    Raises:
        ValueError: some models do not have all tensors; all missing ones are listed.
    """
    found: list[_Tensor] = []
    by_layer = {model: _by_layer(source) for model, source in sources.items()}
    first, last = plan.slices[0], plan.slices[-1]
    ends = dict.fromkeys(input.model for input in (*first.everyone, *last.everyone))
    for name in dict.fromkeys(name for model in ends for name, _ in by_layer[model].get(None, ())):
        part, along = (first, 0.0) if EMBEDDINGS & set(name.split(".")[:-1]) else (last, 1.0)
        found.append(_tensor(name, {input.model: name for input in part.everyone}, along, part))
    offset = 0
    for part in plan.slices:
        count = len(part.inputs[0].layers)
        for index in range(count):
            along = index / (count - 1) if count > 1 else 1.0
            numbers = {input.model: input.layers[index] for input in part.everyone}
            around = (parts for model, number in numbers.items() for parts in by_layer[model].get(number, ()))
            for before, after in dict.fromkeys(around):
                names = {model: f"{before}{number}{after}" for model, number in numbers.items()}
                found.append(_tensor(f"{before}{offset + index}{after}", names, along, part))
        offset += count
    missing = [
        f"{model} has no {name}"
        for tensor in found
        for model, name in [*((input.model, name) for input, name in tensor.members), (plan.base, tensor.base)]
        if name is not None and name not in sources[model].tensors
    ]
    if missing:
        raise UserError("the models do not have the same tensors:\n  " + "\n  ".join(dict.fromkeys(missing)))
    return found


def _by_layer(source: Source) -> dict[int | None, list[tuple[str, str]]]:
    """Layer number → (what is before, what is after it) in its tensors' names; None → names outside of layers.

    Tensors that a checkpoint need not have are left out.
    """
    found: dict[int | None, list[tuple[str, str]]] = {}
    for name in source.tensors:
        if not is_harmless(name):
            match = LAYER.fullmatch(name)
            number, parts = (int(match["number"]), (match["before"], match["after"])) if match else (None, (name, ""))
            found.setdefault(number, []).append(parts)
    return found


def _tensor(name: str, names: Mapping[str, str], along: float, part: Slice) -> _Tensor:
    """The tensor of the result called `name`; `names` gives model → the tensor's name there."""
    members = tuple((input, names[input.model]) for input in part.inputs if input is not part.base)
    return _Tensor(name, members, names[part.base.model] if part.base else None, along, part)


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
        raise UserError("the models' tensors differ in shape:\n  " + "\n  ".join(faults))


def _shape(tensor: _Tensor, sources: Mapping[str, Source]) -> tuple[int, ...]:
    input, name = tensor.members[0]
    return sources[input.model].tensors[name].shape


def _dtype(tensor: _Tensor, plan: Recipe, sources: Mapping[str, Source]) -> np.dtype:
    """The dtype that the tensor is rounded to.

    If the recipe does not say, it is the one that the base's or the first model's is stored in; float32 for the packed
    blocks of a GGUF file.
    """
    if plan.dtype:
        return FLOATS[plan.dtype]
    input, name = tensor.members[0]
    model, name = (input.model, name) if tensor.base is None else (plan.base, tensor.base)
    return DTYPES.get(sources[model].tensors[name].dtype, np.dtype(np.float32))


def _settings(tensors: Sequence[_Tensor], plan: Recipe) -> list[tuple[_Tensor, list[dict], dict]]:
    """(tensor, each model's settings, those that all models share) for every tensor.

    Raises:
        ValueError: required settings are missing, or settings do not go together; each is listed with the first tensor
            that it is wrong for.
    """
    method, found = METHODS[plan.method], []
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
        raise UserError("the recipe is invalid:\n  " + "\n  ".join(lines))
    return found


def _setting(
    name: str, default: Any, tensor: _Tensor, plan: Recipe, input: Input | None = None, member: str | None = None
) -> Any:
    """The parameter's value for a tensor: the model's own, else the slice's, else the recipe's."""
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
    """The setting's value: a number itself, a list of numbers interpolated at `along`, or the first filter that fits.

    None if no filter fits.
    """
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


def _reference(plan: Recipe) -> str:
    """The model whose settings the result has."""
    return plan.base or plan.slices[0].inputs[0].model


def _config(plan: Recipe, sources: Mapping[str, Source]) -> dict[str, Any]:
    """The result's config.json, except for its dtype."""
    model = _reference(plan)
    whole = {key: value for key, value in sources[model].config.items() if key != "torch_dtype"}
    config = dict(_settings_of(sources[model]))
    config.pop("torch_dtype", None)
    count = count_layers(sources[model])
    inputs = [_input_of(part, model) for part in plan.slices]
    faults = []
    for key, value in config.items():
        if key in ("num_hidden_layers", "n_layer"):
            config[key] = sum(len(input.layers) for input in inputs)
        elif isinstance(value, list) and len(value) == count:  # one entry per layer
            own = {input.model: _settings_of(sources[input.model]).get(key) for input in inputs}
            if lacking := [name for name in own if not _has_layers(own[name], count_layers(sources[name]))]:
                faults.append(f"{key}: {model} has one entry a layer, {', '.join(lacking)} does not")
            else:
                config[key] = [own[input.model][layer] for input in inputs for layer in input.layers]
    if faults:
        raise UserError("the models' config.json differ in what they hold:\n  " + "\n  ".join(faults))
    half = half_of(whole)
    return {**whole, half.field: config} if half else config


def _settings_of(source: Source) -> Mapping[str, Any]:
    """What config.json says of the language model."""
    half = half_of(source.config)
    return source.config.get(half.field) or {} if half else source.config


def _has_layers(found: Any, count: int) -> bool:
    return isinstance(found, list) and len(found) == count


def _input_of(part: Slice, model: str) -> Input:
    return next((input for input in part.everyone if input.model == model), part.inputs[0])
