"""PEFT's adapter_config.json: an adapter's modules, ranks and scales, and what jlora cannot apply."""

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jlora.errors import UserError
from jlora.families.kinds import short
from jlora.hub.peft.fields import wrong_fields
from jlora.lora import matching
from jlora.lora.kinds import PRODUCT, TYPES, update_of

CONFIG = "adapter_config.json"
# The PEFT version whose fields are written; readers tell an adapter's age from it.
PEFT_VERSION = "0.21.2"

# PEFT's value for "adapt no linear"; an empty list is an error there.
NO_TARGETS = "dummy-target-modules"

# Fields that change what an adapter computes in ways that jlora does not have, with the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
}
# Initializations that change the base weights too: the saved A and B are right only on that changed base.
CHANGES_BASE = r"pissa.*|olora|corda|loftq|lora_ga"

# Fields that say how an adapter was made, or matter only to training or to the unsupported features above.
IGNORED = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
        *("fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "loftq_config", "lora_ga_config"),
        *("megatron_core", "peft_type", "qalora_group_size", "revision", "runtime_config", "task_type"),
        "velora_config",
    )
)
# Settings of LoRA that other types of adapter may lack: those that an adapter may need, and those that say nothing new.
LORA_NEEDS = (
    *("alpha_pattern", "rank_pattern", "ensure_weight_tying", "target_parameters", "trainable_token_indices"),
    *("use_dora", "lora_bias", "lora_dropout"),
)
LORA_SAYS = ("fan_in_fan_out", "init_lora_weights", "layer_replication", "lora_alpha", "use_rslora")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields that decide what an adapter computes, under PEFT's names."""

    r: int
    lora_alpha: int | float
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    lora_dropout: int | float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | Mapping[str, Sequence[int]] = ()
    target_parameters: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    peft_version: str | None = None
    peft_type: str = "LORA"

    @classmethod
    def from_json(cls, found: Mapping[str, Any], path: Path) -> "AdapterConfig":
        """The config from a file's JSON object.

        Args:
            path: the file, for messages.

        Raises:
            ValueError: fields are missing, malformed, or ask for something that jlora does not do; all are listed.
        """
        if problems := _problems(found):
            raise UserError(f"{path} cannot be applied:\n  " + "\n  ".join(problems))
        found = _as_lora(found)
        known = {field.name for field in dataclasses.fields(cls)} | IGNORED | set(UNSUPPORTED)
        known |= set(update_of(found["peft_type"]).peft_ignored)
        unknown = sorted(k for k, v in found.items() if k not in known and v)
        if unknown:
            warnings.warn(f"{path}: fields that jlora does not know are ignored: {', '.join(unknown)}", stacklevel=3)
        layers = found.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        tokens = found.get("trainable_token_indices")
        return cls(
            r=found["r"],
            lora_alpha=found["lora_alpha"],
            target_modules=_frozen(found.get("target_modules")),
            exclude_modules=_frozen(found.get("exclude_modules")),
            layers_to_transform=tuple(layers) if layers else None,
            lora_dropout=found.get("lora_dropout") or 0.0,
            use_rslora=bool(found.get("use_rslora")),
            rank_pattern=dict(found.get("rank_pattern") or {}),
            alpha_pattern=dict(found.get("alpha_pattern") or {}),
            use_dora=bool(found.get("use_dora")),
            lora_bias=bool(found.get("lora_bias")),
            bias=found.get("bias") or "none",
            modules_to_save=tuple(found.get("modules_to_save") or ()),
            trainable_token_indices=tokens if isinstance(tokens, dict) else tuple(tokens or ()),
            target_parameters=tuple(found.get("target_parameters") or ()),
            ensure_weight_tying=bool(found.get("ensure_weight_tying")),
            peft_version=found.get("peft_version"),
            peft_type=found["peft_type"],
        )

    def rank(self, module: str) -> int:
        """The rank of a module by its Hub name."""
        return matching.rank_of(self, [module])

    def scale(self, module: str) -> float:
        """The scale of a module by its Hub name."""
        return matching.scale_of(self, [module])

    def targets(self, module: str, *, linear: bool = True) -> bool | None:
        """Whether the adapter targets this module; None if the config leaves that to PEFT's defaults.

        Args:
            linear: whether the module is a linear rather than an embedding.
        """
        return matching.targets(self, [module], linear=linear)

    def targets_parameter(self, name: str) -> bool:
        """Whether the adapter targets this parameter: the experts' or a router's weight."""
        return matching.matches([name], self.target_parameters)

    def saves(self, module: str) -> bool:
        """Whether the adapter holds a whole copy of this module."""
        return matching.saves([module], self.modules_to_save)

    def token_rows(self, embedding: str) -> dict[str, Sequence[int]]:
        """Module name → the tokens whose rows the adapter replaces; a config without module names means `embedding`."""
        tokens = self.trainable_token_indices
        return dict(tokens) if isinstance(tokens, Mapping) else {embedding: tokens} if tokens else {}


class Summary(NamedTuple):
    """An adapter as adapter_config.json describes it.

    Attributes:
        ranks, alphas: full name → rank or alpha, for every adapted module.
        linears: every module of the base that could be adapted; a target's name is shortened only if it then matches
            no module that is not adapted.
        kinds: the field of PEFT's config → whether the adapter has the kind that the field stands for.
        peft_type: PEFT's type of the update.
        targets, parameters: the adapted modules, and the adapted parameters that are not modules.
        tokens: as `trainable_token_indices`.
        tied: whether the embedding's adapter acts in the head too.
        experts: what the names of adapted linears of single experts end in, if they are adapted one by one; ranks and
            alphas may then have patterns for names.
        whole: whether names must be whole, because the model has other parts, whose modules may end in the same way.
        task_type: PEFT's; "SEQ_CLS" for reward models, whose score head is one of `modules_to_save`.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, int | float]
    linears: Sequence[str]
    targets: Sequence[str]
    parameters: Sequence[str]
    dropout: float
    kinds: Mapping[str, bool]
    peft_type: str
    bias: str
    modules_to_save: Sequence[str]
    tokens: Sequence[int] | Mapping[str, Sequence[int]] | None
    tied: bool
    fan_in_fan_out: bool
    task_type: str
    whole: bool = False
    experts: Sequence[str] = ()


def to_json(summary: Summary, *, base: str | None) -> dict[str, Any]:
    """The adapter_config.json of an adapter."""
    ranks, alphas = summary.ranks, summary.alphas
    targets = sorted(summary.targets) if summary.whole else _target_names(summary.targets, summary.linears)
    targets = sorted({*targets, *summary.experts})
    only_saved = summary.modules_to_save and not targets and not summary.parameters
    r, alpha = (_commonest(values.values()) if values else 8 for values in (ranks, alphas))
    fields = {
        "alpha_pattern": {module: value for module, value in sorted(alphas.items()) if value != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": summary.bias,
        "ensure_weight_tying": summary.tied,
        "exclude_modules": None,
        "fan_in_fan_out": summary.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": summary.dropout,
        "modules_to_save": list(summary.modules_to_save) or None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": r,
        "rank_pattern": {module: value for module, value in sorted(ranks.items()) if value != r},
        "revision": None,
        "target_modules": NO_TARGETS if only_saved else targets,
        "target_parameters": _parameter_names(summary.parameters),
        "task_type": summary.task_type,
        "trainable_token_indices": summary.tokens,
        "use_rslora": False,
        **summary.kinds,
    }
    return _as_type(fields, summary.peft_type)


def _problems(found: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    update = update_of(found.get("peft_type"))
    if update is None:
        problems.append(
            f"peft_type is {found.get('peft_type')!r}; only {' and '.join(map(repr, TYPES))} adapters are read"
        )
    problems += [
        f"{name}={short(found[name])} is not supported"
        for name, unused in sorted(UNSUPPORTED.items())
        if name in found and all(found[name] is not value and found[name] != value for value in unused)
    ]
    problems += [
        f"{name}={short(found[name])} is not supported"
        for name, refused in (update.peft_refused if update else {}).items()
        if found.get(name) in refused
    ]
    start = found.get("init_lora_weights", True)
    if isinstance(start, str) and re.fullmatch(CHANGES_BASE, start):
        problems.append(
            f"init_lora_weights={start!r} changes the base weights as well; save it from PEFT as a plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    problems += wrong_fields(_as_lora(found), ("r", "lora_alpha"))
    if found.get("use_dora") and found.get("lora_bias"):
        problems.append("use_dora and lora_bias do not go together (PEFT does not open such an adapter either)")
    return problems


def _as_lora(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under the names that LoRA's have. An update without an alpha has a scale of 1."""
    update = update_of(found.get("peft_type"))
    if update is None or update is PRODUCT:
        return dict(found)
    names = {name: field for field, name in update.peft_names.items()}
    return {names.get(name, name): value for name, value in found.items()} | {"lora_alpha": found.get("r")}


def _as_type(fields: dict[str, Any], peft_type: str) -> dict[str, Any]:
    """The fields that adapters of one of PEFT's types have, from those of LoRA.

    Raises:
        UserError: some are needed that this type lacks; all are listed.
    """
    if peft_type == "LORA":
        return fields
    names = update_of(peft_type).peft_names
    lost = [name for name in LORA_NEEDS if name not in names and fields[name]]
    if lost:
        raise UserError(f"PEFT's {peft_type} adapters have no {', '.join(lost)}: merge the adapter instead")
    return {
        names.get(name, name): value
        for name, value in fields.items()
        if name in names or name not in (*LORA_NEEDS, *LORA_SAYS)
    } | {"peft_type": peft_type}


def _parameter_names(parameters: Sequence[str]) -> list[str] | None:
    """Sorted ends of the names, each of which means the parameter in every layer: all layers are adapted or none."""
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name in parameters}) or None


def _frozen(names: str | Sequence[str] | bool | int | None) -> str | tuple[str, ...] | None:
    """The names as they are kept; false and 0 say as little as null."""
    return names if isinstance(names, str) else tuple(names) if isinstance(names, list | tuple) else None


def _commonest(values: Iterable[Any]) -> Any:
    """The most frequent value; the largest one if several are."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _target_names(modules: Sequence[str], linears: Iterable[str]) -> list[str]:
    """Sorted names: the last part if every linear of the base with that ending is adapted, else the whole name."""
    adapted = set(modules)
    partial = {name.rpartition(".")[2] for name in linears if name not in adapted}
    return sorted({name if name.rpartition(".")[2] in partial else name.rpartition(".")[2] for name in adapted})
