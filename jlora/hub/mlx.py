"""Reads mlx-lm's adapter folders (LoRA and DoRA) as strictly as PEFT's: either all of it fits, or nothing is loaded."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora import lora
from jlora.errors import MissingFileError, UserError
from jlora.families import every
from jlora.families.kinds import NUMBER, short
from jlora.hub.checkpoints.weights import TensorInfo, listing, read_json, tensor_infos
from jlora.hub.peft.config import CONFIG, AdapterConfig
from jlora.hub.peft.fields import SHARE
from jlora.hub.peft.reading import assemble
from jlora.hub.peft.slots import PLAIN, PREFIX, Module, Slot, check_fits, find_modules, read_slots
from jlora.lora.kinds.dora import MAGNITUDE
from jlora.lora.kinds.product import A, B
from jlora.types import Params

WEIGHTS = "adapters.safetensors"
# (pattern of transformers' names, mlx-lm's replacement), where the two differ.
NAMES = every(lambda family: family.mlx_names)
LAYER = re.compile(r"model\.(?:layers|h)\.(?P<layer>\d+)\.(?P<key>.+)")
# Part of the names of experts' linears (SwitchLinear): gate and up are separate there, while jlora fuses them.
EXPERTS = ".switch_mlp."


# The leaves that it holds, by the ends of its tensors' names.
ENDS = {A: "lora_a", B: "lora_b", MAGNITUDE: "m"}


class Settings(NamedTuple):
    """The settings of mlx-lm's adapter_config.json.

    Attributes:
        scale: the factor of A @ B.
        layers: the number of adapted layers, counted from the last; None for all.
        keys: the adapted modules, by their names in a layer or in the model; None for those that the file holds.
    """

    rank: int
    scale: float
    dropout: float
    layers: int | None
    keys: frozenset[str] | None
    use_dora: bool


def is_mlx(fields: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is mlx-lm's rather than PEFT's."""
    return "peft_type" not in fields and ("lora_parameters" in fields or "fine_tune_type" in fields)


def load_adapter(params: Params, folder: Path) -> Params:
    """The params with the adapter of mlx-lm's folder in place of any adapter they had.

    model.layers.3.self_attn.q_proj.lora_a (D, R), lora_b (R, N)  →  layers/self_attn/q_proj/lora_a[3], lora_b[3]
                                    .m (N,) of DoRA               →  layers/self_attn/q_proj/lora_magnitude[3]

    Raises:
        FileNotFoundError: the folder or its files are missing.
        ValueError: fields are invalid, or tensors are missing, unknown or misshapen; all are listed.
    """
    settings = parse(read_json(folder / CONFIG), folder / CONFIG)
    file = folder / WEIGHTS
    if not file.is_file():
        raise MissingFileError(f"no {WEIGHTS} in {folder}; files there: {listing(folder)}")
    found = tensor_infos([file])
    if experts := [name for name in found if EXPERTS in name]:
        raise UserError(f"{file} adapts experts ({experts[0]}, …), which is not supported in mlx-lm's format")
    base = lora.strip(params)
    modules = _modules(base)
    wanted = _wanted(modules, settings, found)
    adapted = [module for module in modules if module.tensors in wanted]
    slots = _slots(adapted, settings)
    check_fits(file, found, slots, set(), modules, prefix="")
    config = AdapterConfig(
        r=settings.rank,
        lora_alpha=settings.scale * settings.rank,
        lora_dropout=settings.dropout,
        use_dora=settings.use_dora,
        ensure_weight_tying=True,  # an embedding that is the head too carries its adapter along (`as_linear`)
    )
    return assemble(base, adapted, config, slots, read_slots(file, slots))


def parse(fields: Mapping[str, Any], path: Path) -> Settings:
    """The settings in a config's fields, from any version of mlx-lm.

    Up to September 2024 the number of layers was `lora_layers`, and DoRA was a separate flag. Up to June 2024 there was
    also an `alpha`, and the scale was scale · alpha / rank; later versions ignore an alpha that is still there.

    Raises:
        ValueError: fields are missing, malformed, or those of a full fine-tune; all are listed.
    """
    old = "num_layers" not in fields
    lora_fields = fields.get("lora_parameters") or {}
    layers = fields.get("lora_layers" if old else "num_layers")
    if problems := _problems(fields, lora_fields, layers):
        raise UserError(f"{path} cannot be applied:\n  " + "\n  ".join(problems))
    scale = lora_fields["scale"]
    if "alpha" in lora_fields and old:
        scale = scale * lora_fields["alpha"] / lora_fields["rank"]
    elif "alpha" in lora_fields:
        warnings.warn(f"{path}: alpha is ignored, as mlx-lm has done since it writes num_layers", stacklevel=3)
    keys = lora_fields.get("keys")
    use_dora = bool(fields.get("use_dora")) if "fine_tune_type" not in fields else fields["fine_tune_type"] == "dora"
    return Settings(
        rank=lora_fields["rank"],
        scale=float(scale),
        dropout=float(lora_fields.get("dropout") or 0.0),
        layers=None if layers < 0 or (layers == 0 and not old) else layers,
        keys=None if keys is None else frozenset(keys),
        use_dora=use_dora,
    )


def _problems(fields: Mapping[str, Any], lora_fields: Any, layers: Any) -> list[str]:
    kind = fields.get("fine_tune_type", "lora")
    if kind == "full":
        return ["fine_tune_type is 'full': these are whole weights, not an adapter; open the fused model instead"]
    problems = []
    if kind not in ("lora", "dora"):
        problems.append(f"fine_tune_type is {kind!r}; expected 'lora' or 'dora'")
    if not isinstance(layers, int) or isinstance(layers, bool):
        problems.append(f"num_layers is {layers!r}; expected an integer")
    if not isinstance(lora_fields, dict):
        return [*problems, f"lora_parameters is {lora_fields!r}; expected an object"]
    rank, keys = lora_fields.get("rank"), lora_fields.get("keys")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        problems.append(f"lora_parameters.rank is {rank!r}; expected a positive integer")
    for name, default in (("scale", None), ("alpha", 0), ("dropout", 0.0)):
        value = lora_fields.get(name, default)
        kind = SHARE if name == "dropout" else NUMBER
        if not kind.holds(value):
            problems.append(f"lora_parameters.{name} is {short(value)}; expected {kind.what}")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        problems.append(f"lora_parameters.keys is {keys!r}; expected a list of names")
    return problems


def _modules(base: Params) -> list[Module]:
    """The modules that mlx-lm can adapt, with its names in `tensors`; a head tied to its embedding is left out."""
    return [
        module._replace(tensors=_mlx_name(module.tensors.removeprefix(PREFIX)))
        for module in find_modules(base)
        if not module.site.experts and not module.site.tied_to
    ]


def _mlx_name(name: str) -> str:
    for pattern, new in NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, new, name, count=1)
    return name


def _wanted(modules: list[Module], settings: Settings, found: Mapping[str, TensorInfo]) -> set[str]:
    """mlx-lm's names of the modules that the config targets.

    Without `keys` it targets all linears of a layer, or in old versions only some (depending on the kind of model).
    Here it then means those that the file holds in any layer, and they must be in every adapted layer.
    """
    places = {module.tensors: LAYER.fullmatch(module.tensors) for module in modules}
    keys = settings.keys
    if keys is None:
        named = (LAYER.fullmatch(name.rpartition(".")[0]) for name in found)
        keys = {place["key"] for place in named if place}
    total = 1 + max((int(place["layer"]) for place in places.values() if place), default=-1)
    first = 0 if settings.layers is None else max(0, total - settings.layers)
    return {
        name
        for name, place in places.items()
        if name in keys or (place and place["key"] in keys and int(place["layer"]) >= first)
    }


def _slots(adapted: list[Module], settings: Settings) -> dict[str, Slot]:
    """Tensor name → slot; nothing is transposed, since mlx-lm's A and B have jlora's layout.

    Raises:
        ValueError: the config asks for DoRA of a module that is not a linear.
    """
    if settings.use_dora and (others := [module.tensors for module in adapted if module.site.leaf != "kernel"]):
        raise UserError(f"DoRA of {', '.join(others)} is not supported: it is not a linear layer")
    slots = {}
    for module in adapted:
        sizes = {"inputs": module.site.inputs, "rank": settings.rank, "outputs": module.site.outputs}
        for leaf, end in ENDS.items():
            if leaf != MAGNITUDE or settings.use_dora:
                shape = tuple(sizes[axis] for axis in leaf.axes)
                slots[f"{module.tensors}.{end}"] = Slot(f"{module.path}/{leaf.name}", module.index, shape, PLAIN)
    return slots
