"""Writes PEFT adapter folders: complete or not at all, and the same bytes for the same adapter."""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors.numpy import save_file

from jlora import lora, tree
from jlora.errors import UserError, first_few, number_of
from jlora.families import FAMILIES, Family, each
from jlora.hub.cards import FILE as CARD
from jlora.hub.cards import Card, how_to_use, hub_id, is_as_written, is_own, shown
from jlora.hub.checkpoints import names
from jlora.hub.checkpoints.folder import replacing, require_own
from jlora.hub.checkpoints.score import has_score
from jlora.hub.checkpoints.weights import read_json, require_finite
from jlora.hub.peft.config import CONFIG, NO_TARGETS, Summary, to_json
from jlora.hub.peft.names import AdapterNames, copied_modules
from jlora.hub.peft.reading import WEIGHTS
from jlora.hub.peft.single import separate_experts
from jlora.hub.peft.slots import PREFIX, Module, base_weight, extra_slots, find_modules, input_embedding
from jlora.hub.peft.vocabulary import vocabulary_copies
from jlora.lora.kinds import BIAS, DORA, KINDS, LEAVES, PRODUCT, TIED, TYPES, update_of, width
from jlora.lora.kinds.copies import copy_of
from jlora.lora.kinds.kind import DROPOUT, RANK, SCALE, Leaf
from jlora.lora.kinds.product import A, B
from jlora.lora.kinds.tokens import IDS
from jlora.lora.sites import Tie, tie
from jlora.models.model import SCORE
from jlora.names import ExpertLayout
from jlora.types import Params

STALE = ("adapter_model*",)


def save_adapter(
    path: str | Path,
    params: Params,
    base: str | None = None,
    *,
    fold: bool = False,
    experts: str = "stacked",
    save_embedding_layers: bool = False,
    force: bool = False,
) -> None:
    """Writes the adapter in `params` as a PEFT folder, complete or not at all; the same adapter gives the same bytes.

    An adapter that started from the base's weights (PiSSA, OLoRA) is written as a plain LoRA of twice the rank on the
    untouched base. With a score head, the folder is an adapter of transformers' …ForSequenceClassification with one
    label and holds the whole head.

    Args:
        base: the Hub id or path of the base model, for adapter_config.json.
        fold: pad all modules with zeros to the largest rank and multiply their scales into B, which leaves a scale of
            1, so that readers without rank_pattern and alpha_pattern, such as vLLM, compute the same.
        experts: "stacked" writes the adapters of experts as PEFT does, one for all experts of a layer; "each" one by
            one, with factors for every linear of every expert, as vLLM and SGLang read them. The names are then those
            of the family, which `base` tells. `load_adapter` opens both.
        save_embedding_layers: also write the base's embedding and head, as PEFT does for a base that was given more
            rows for tokens (`jlora.load(..., vocab=…)`): readers must resize their base to as many, and then get the
            same rows. Without it, those that came with an adapter (`jlora.load_adapter`) are still written, and both
            are if `base` is a folder whose config.json has fewer rows. Leaves that a program replaced by itself cannot
            be told from the base's.
        force: also replace an adapter that jlora did not write. jlora's README.md stays if it was changed.

    Raises:
        ValueError: `params` hold no adapter, one that PEFT's format cannot express, or values that are not finite; or
            `base` is needed for names and does not tell the family.
        FileExistsError: `path` holds something other than an adapter, or one that jlora did not write.
    """
    if not force:
        require_own(path)
    params = _whole_score(tree.map_modules(lambda _, module: PRODUCT.as_product(module), params))
    if experts not in get_args(ExpertLayout):
        raise UserError(f"experts={experts!r}: expected one of {', '.join(get_args(ExpertLayout))}")
    tensors, summary = _contents(params, fold=fold)
    flat = tree.flatten(params)
    if experts == "each":
        tensors, summary = separate_experts(tensors, summary, find_modules(params), flat, base)
    tensors |= vocabulary_copies(flat, tensors, every=save_embedding_layers or _has_more_rows(flat, base))
    require_finite(tensors)
    _warn_of_refused(summary.targets, base)
    config = to_json(summary, base=base)
    with replacing(path, marker=CONFIG, stale=STALE) as folder:
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        ordered = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
        save_file(ordered, folder / WEIGHTS, metadata={"format": "pt"})
        if is_as_written(path) or not is_own(path):
            (folder / CARD).write_text(str(_card(config)), encoding="utf-8")


def scales_note(path: str | Path) -> str | None:
    """A note for the user if readers that know one rank and one scale would compute something else; None if not."""
    config = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
    r, alpha = config["r"], config.get("lora_alpha", config["r"])
    ranks, alphas = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
    scales = {name: alphas.get(name, alpha) / ranks.get(name, r) for name in sorted({*ranks, *alphas})}
    found = [name for name, scale in scales.items() if abs(scale - alpha / r) > 1e-6 * abs(alpha / r)]
    if not found:
        return None
    return (
        f"{number_of(len(found), 'module')} with a scale of its own ({first_few(found)}), by rank_pattern and "
        "alpha_pattern, which vLLM and others do not read; --fold (train.fold, save_adapter(…, fold=True)) writes one "
        "rank and scale for all"
    )


def _has_more_rows(flat: Mapping[str, Any], base: str | None) -> bool:
    """Whether the embedding has more rows than the base's config.json says; False if there is no such file."""
    family, config = _described(base)
    rows = (family.settings(config) if family else config).get("vocab_size")
    pair = tie(flat)
    return isinstance(rows, int) and pair is not None and flat[pair.weight].shape[0] > rows


def _warn_of_refused(targets: Iterable[str], base: str | None) -> None:
    """Warns of adapted modules whose adapters PEFT does not open for the base's family."""
    family, config = _described(base)
    if found := sorted({name.rpartition(".")[2] for name in targets} & set(family.refused if family else ())):
        warnings.warn(
            f"{base}: PEFT opens no adapter of {', '.join(found)} in models of the type {config['model_type']}; "
            f"LoraConfig(exclude_modules={found}) leaves them out, merging keeps them",
            stacklevel=3,
        )


def _described(base: str | None) -> tuple[Family | None, dict[str, Any]]:
    """(the family, config.json) of the base if it is a folder with such a file."""
    file = Path(base or "") / "config.json"
    if base is None or not file.is_file():
        return None, {}
    try:
        config = read_json(file)
    except UserError:  # `base` is only a name for adapter_config.json and need not be a model
        return None, {}
    return FAMILIES.get(str(config.get("model_type"))), config


def _contents(params: Params, *, fold: bool) -> tuple[dict[str, np.ndarray], Summary]:
    """(tensors by name, what adapter_config.json says about them)."""
    flat = tree.flatten(params)
    modules = [module for module in find_modules(params) if f"{module.path}/{SCALE.name}" in flat]
    if both := {module.path for module in modules if copy_of(f"{module.path}/{module.site.leaf}") in flat}:
        raise UserError(f"PEFT's format holds either a trained copy of a module or factors; found both: {sorted(both)}")
    peft_type = _type(flat)
    plain = peft_type != PRODUCT.peft_type  # other types have neither scales nor ranks to pad
    settings = {module: found for module in modules if (found := _settings(flat, module))[1]}
    widest = max((rank for _, rank in settings.values()), default=0) if fold and not plain else 0
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    for module, (scale, rank) in settings.items():
        ranks[module.name] = widest or rank
        alphas[module.name] = widest or (rank if plain else _tidy(scale * rank))
        tensors |= _factors(flat, module, rank, width=ranks[module.name], scale=scale if fold or plain else 1.0)
    if pair := _tied(flat):  # the same factors under another name
        called = AdapterNames(flat).modules(pair.embedding)[0]
        if called in ranks:
            ranks[pair.head], alphas[pair.head] = ranks[called], alphas[called]
    tensors |= _mirrored_head(tensors, flat)
    extra = extra_slots(flat, {module.name for module in settings})
    tensors |= {name: slot.codec.to_file(_layer(flat[slot.path], slot.index)) for name, slot in extra.items()}
    if not tensors:
        raise UserError("there is no adapter in these params (no lora_a leaf); make one with jlora.lora.init")
    return tensors | _base_copies(flat, modules), _summary(params, ranks, alphas, peft_type)


def _type(flat: Mapping[str, Any]) -> str:
    """PEFT's type of the adapter."""
    names = {path.rpartition("/")[2] for path in flat}
    types = [name for name in TYPES if update_of(name).is_in(names)]
    if len(types) > 1:
        raise UserError(f"PEFT's format has adapters of one type; found {' and '.join(types)}")
    return types[0] if types else PRODUCT.peft_type


def _factors(flat: Mapping[str, Any], module: Module, rank: int, *, width: int, scale: float) -> dict[str, np.ndarray]:
    """The tensors of one layer's update, multiplied by `scale` and zero-padded to the rank `width`."""
    tensors = {}
    for leaf in (leaf for kind in KINDS for leaf in kind.leaves if leaf.peft and f"{module.path}/{leaf.name}" in flat):
        name, _, codec = module.tensor(leaf, width)
        value = module.used(leaf, _layer(flat[f"{module.path}/{leaf.name}"], module.index), rank)
        value = module.padded(leaf, value, width)
        tensors[name] = codec.to_file(value * scale if leaf.scaled else value)
    return tensors


def _tied(flat: Mapping[str, Any]) -> Tie | None:
    """The embedding and head of an adapter that acts in both."""
    pair = tie(flat)
    return pair if pair and f"{pair.embedding}/{TIED.name}" in flat else None


def _mirrored_head(tensors: Mapping[str, np.ndarray], flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The head's tensors, which repeat the embedding's, for an adapter that acts in both."""
    mirrored: dict[str, np.ndarray] = {}
    if pair := _tied(flat):
        name = f"{PREFIX}{names.module_names(pair.embedding, 1)[0]}"
        for end, source in ((A.peft, B.peft_embedding), (B.peft, A.peft_embedding)):
            if f"{name}.{source}" in tensors:
                mirrored[f"{PREFIX}{pair.head}.{end}"] = tensors[f"{name}.{source}"].T
        if copy_of(pair.weight) in flat:
            mirrored[f"{PREFIX}{pair.head}.weight"] = np.asarray(flat[copy_of(pair.weight)])
    return mirrored


def _base_copies(flat: Mapping[str, Any], modules: list[Module]) -> dict[str, np.ndarray]:
    """The base's embedding and head if they are adapted; PEFT writes them beside their adapters."""
    pair, tied, copies = tie(flat), _tied(flat), {}
    for module in modules:
        weight = base_weight(flat, module) if pair and module.path in pair.modules else None
        if weight is not None:
            heads = [PREFIX + tied.head] if tied and module.path == tied.embedding else []
            copies |= {f"{name}.base_layer.weight": np.asarray(weight) for name in (module.tensors, *heads)}
    return copies


def _whole_score(params: Params) -> Params:
    """The params with the whole score head as a trained copy, as PEFT has it for sequence classifiers."""
    if not has_score(params) or not any(lora.is_adapter(path) for path in tree.flatten(params)):
        return params
    return params | {SCORE: {copy_of("kernel"): lora.merged_leaf(lora.resolve(params[SCORE]), "kernel")}}


def _settings(flat: Mapping[str, Any], module: Module) -> tuple[float, int]:
    """(scale, rank) of one layer's adapter."""
    scale = float(_layer(flat[f"{module.path}/{SCALE.name}"], module.index))
    rank = flat.get(f"{module.path}/{RANK.name}")
    if rank is None:
        own = {name: flat[f"{module.path}/{name}"] for name in LEAVES if f"{module.path}/{name}" in flat}
        return scale, width(own)
    return scale, int(_layer(rank, module.index))


def _layer(leaf: Any, index: int | None) -> np.ndarray:
    # Index on the host: on a device, five small programs would be compiled for every shape.
    value = np.asarray(leaf) if index is None else np.asarray(np.asarray(leaf)[index])
    return value.astype(np.float32) if value.dtype != np.int32 else value


def _summary(params: Params, ranks: dict[str, int], alphas: dict[str, int | float], peft_type: str) -> Summary:
    """What adapter_config.json says about the adapter in `params`."""
    flat = tree.flatten(params)
    every = find_modules(params)
    adapted = [module for module in every if module.name in ranks]
    pair = _tied(flat)
    tied = [pair.head] if pair and f"{pair.embedding}/{SCALE.name}" in flat else []

    def in_all(leaf: Leaf) -> bool:
        have = [f"{module.path}/{leaf.name}" in flat for module in adapted]
        if any(have) and not all(have):
            raise UserError(f"PEFT's format has {leaf.name} in every adapted module or in none; found it in some")
        return any(have)

    bias, saved = _copies(flat, {module.path for module in adapted})
    dropouts = [np.max(leaf) for path, leaf in flat.items() if path.endswith(f"/{DROPOUT.name}")]
    return Summary(
        ranks=ranks,
        alphas=alphas,
        linears=[module.name for module in every if not module.is_parameter],
        targets=[module.name for module in adapted if not module.is_parameter] + tied,
        parameters=[module.name for module in adapted if module.is_parameter],
        dropout=float(max(dropouts, default=0.0)),
        kinds={kind.peft_field: in_all(kind.leaves[0]) for kind in (DORA, BIAS)},
        peft_type=peft_type,
        bias=bias,
        modules_to_save=_saved_names(flat, saved),
        tokens=_token_ids(flat),
        tied=pair is not None,
        fan_in_fan_out=any(re.fullmatch(names.UNTRANSPOSED, f"{module.path}/kernel") for module in adapted),
        task_type="SEQ_CLS" if has_score(params) else "CAUSAL_LM",
        whole=_has_other_parts(flat),
    )


def _has_other_parts(flat: Mapping[str, Any]) -> bool:
    """Whether this is the language model of one that has other parts too."""
    stacks = {stack.name for path in flat if (stack := tree.stack_of(path))}
    return tree.is_own(flat) and bool(stacks & {*each(lambda family: family.names.stack if family.half else None)})


def _saved_names(flat: Mapping[str, Any], saved: set[str]) -> list[str]:
    called = AdapterNames(flat)
    if _has_other_parts(flat):
        return sorted(name for module in saved for name in called.modules(module))
    return called.shortest(saved)


def _copies(flat: Mapping[str, Any], adapted: set[str]) -> tuple[str, set[str]]:
    """(`bias`, the modules of `modules_to_save`) that account for all trained copies."""
    copies = copied_modules(flat)
    saved = {module for module, leaves in copies.items() if leaves != {"bias"}}
    trained = copies.keys() - saved
    every = {path.rpartition("/")[0] for path in flat if path.endswith("/bias")} - saved
    if trained and trained == every:
        return "all", saved
    # Modules that hold only a bias count as copied whole, unless they are adapted.
    more = {path.rpartition("/")[0] for path in flat if path.rpartition("/")[2] not in ("bias", copy_of("bias"))}
    saved, trained = saved | (trained - more), trained & more
    if not trained:
        return "none", saved
    if trained == every & adapted:
        return "lora_only", saved
    raise UserError(f"PEFT's format trains all biases, or those of adapted modules; found others: {sorted(trained)}")


def _token_ids(flat: Mapping[str, Any]) -> list[int] | dict[str, list[int]] | None:
    called = AdapterNames(flat)
    ids = {}
    for path, leaf in flat.items():
        if path.endswith(f"/{IDS.name}"):
            module = path.rpartition("/")[0]
            last = module.rpartition("/")[2]
            ids[last if called.only(last) == [module] else called.modules(module)[0]] = np.asarray(leaf).tolist()
    return ids.get(input_embedding(flat)) if len(ids) == 1 and input_embedding(flat) in ids else ids or None


def _tidy(alpha: float) -> int | float:
    """`alpha`, or the integer it was before its scale was rounded to float32."""
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) <= 1e-6 * max(1.0, abs(alpha)) else alpha


def _card(config: Mapping[str, Any]) -> Card:
    """The card of an adapter, before `jlora publish` tells more of it."""
    base = config["base_model_name_or_path"]
    targets = config["modules_to_save" if config["target_modules"] == NO_TARGETS else "target_modules"]
    on = ", ".join(dict.fromkeys(re.sub(r"^`experts\.\d+\.", "`experts.*.", f"`{name}`") for name in targets))
    scored = config["task_type"] == "SEQ_CLS"
    by_module = config.get("rank_pattern") or config.get("alpha_pattern")
    alpha = f", alpha {config['lora_alpha']}" if "lora_alpha" in config else ""
    return Card(
        title=f"{'LoRA' if alpha else config['peft_type']} adapter",
        library="peft",
        bases=[base] if hub_id(base) else [],
        relation="adapter",
        task="text-classification" if scored else "text-generation",
        sections=[
            f"Trained with jlora{f' on {shown(base)}' if base else ''}. Rank {config['r']}{alpha}, on {on}.",
            how_to_use("adapter", hub_id(base) or "path/to/the/base", "path/to/this/folder", scored=scored),
            *(["Ranks and scales differ by module: readers need rank_pattern and alpha_pattern."] if by_module else []),
        ],
    )
