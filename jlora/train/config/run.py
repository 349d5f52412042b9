"""The settings of a run: one dataclass that holds every group's, and how to get there from a ConfigDict.

Defaults live in the dataclasses alone; recipes start from `default_config()` and change what differs.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import RequiredValueError

from jlora.errors import UserError, raise_all
from jlora.lora.full import PACKED, FullConfig
from jlora.optim import OWN_SETTINGS
from jlora.train.algorithms import ALGORITHMS
from jlora.train.config import typed
from jlora.train.settings import SharedConfig

# The algorithms' own groups of settings, by name.
GROUPS = {name: group for algorithm in ALGORITHMS.values() for name, group in algorithm.groups.items()}
EACH = "each adapter's own"  # the run's data.path if its adapters share no data

# What may differ between the adapters of one run: groups, or settings of a group.
OWN = ("data", "lora", "model.adapter", *(f"optim.{name}" for name in OWN_SETTINGS), "train.seed")

_WithGroups = dataclasses.make_dataclass(
    "_WithGroups",
    [(name, group, group()) for name, group in GROUPS.items()],
    bases=(SharedConfig,),
    frozen=True,
    kw_only=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(_WithGroups):
    """Everything that decides what a run does.

    Attributes:
        algorithm: what is minimised, on which data: "sft" and "dft" learn from texts; "dpo", "cpo", "orpo" and "reward"
            from pairs of answers, "kto" from single ones; "grpo" and "ppo" from the model's own completions.
        adapters: several adapters to train side by side on one base, by name, each with its own settings, as --sweep
            takes them: {"shop": {"data": {"path": "shop.jsonl"}, "optim": {"learning_rate": 1e-4}}, "law": …}.
    """

    algorithm: Literal[tuple(ALGORITHMS)] = "sft"
    adapters: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def members(self) -> dict[str, "RunConfig"]:
        """The settings under which each of `adapters` would be trained alone, by name.

        Names are sorted, because the order of adapters in a checkpoint follows them, whatever order a recipe uses.

        Raises:
            ValueError: settings that cannot be an adapter's own, or are invalid; all are listed.
        """
        members, faults = {}, []
        shared = dataclasses.asdict(self) | {"adapters": {}}
        if self.data.path == EACH:
            shared["data"]["path"] = None
        for name, own in sorted(self.adapters.items()):
            found = foreign(own)
            merged = {
                group: value | own[group] if isinstance(value, dict) and isinstance(own.get(group), Mapping) else value
                for group, value in shared.items()
            }
            if not found:
                members[name], found = typed.build(RunConfig, merged)
                found += typed.unknown_keys(RunConfig, merged)
                if not found and members[name].data.system != self.data.system:
                    found = [f"data.system: expected {self.data.system!r}, as in the run: they share a tokenizer"]
            faults += [f"adapters[{name!r}]: {fault}" for fault in found]
        raise_all(faults)
        return members

    def _adapter_faults(self) -> list[str]:
        faults = [
            f"adapters: found the name {name!r}, expected letters, digits, '_', '-' and '.', since it names a folder"
            for name in self.adapters
            if not re.fullmatch(r"[\w-][\w.-]*", name)
        ]
        faults += trained_alone(self.algorithm)
        try:
            self.members()
        except UserError as error:
            faults.append(str(error))
        return faults

    def __post_init__(self) -> None:
        faults = self._adapter_faults() if self.adapters else []
        faults += self._idle_groups() + ALGORITHMS[self.algorithm].faults(self)
        faults += [] if self.adapters else self._data_faults()
        faults += self._full_faults()
        if self.model.merges_packed and self.lora and self.lora.lora_dropout:
            faults.append(
                "lora.lora_dropout: the packed sum of base and adapter (merge_aware) cannot drop inputs; set 0"
            )
        algorithm = ALGORITHMS[self.algorithm]
        if self.train.metrics and algorithm.samples:
            faults.append(
                f"train.metrics: {self.algorithm} judges completions by its rewards; name the function in "
                "rollout.rewards, with a weight of 0 in rollout.reward_weights if it shall only be watched"
            )
        if self.train.metrics and algorithm.scores:
            faults.append("train.metrics: are of texts that the model writes; a reward model writes none")
        raise_all(faults)

    def _full_faults(self) -> list[str]:
        """What does not go with full fine-tuning, or is only for it."""
        if self.lora is not None:
            changed = [f"full.{key}" for key, value in vars(self.full).items() if value != getattr(FullConfig(), key)]
            return [f"{', '.join(changed)}: has no effect without lora=None (full fine-tuning)"] if changed else []
        faults = []
        if self.model.quant is not None and self.full == FullConfig(weights=self.full.weights):
            faults.append(f"model.quant: full fine-tuning (lora=None) cannot train packed weights: {PACKED}")
        if self.model.adapter:
            faults.append("model.adapter: full fine-tuning (lora=None) trains no adapter; merge it first (jlora merge)")
        if self.adapters:
            faults.append("adapters: full fine-tuning (lora=None) trains no adapters")
        if ALGORITHMS[self.algorithm].samples:
            able = ", ".join(name for name, one in ALGORITHMS.items() if not one.samples)
            faults.append(f"lora: None (full fine-tuning) is for {able}; {self.algorithm} trains an adapter")
        if self.optim.loraplus_lr_ratio != 1:
            faults.append("optim.loraplus_lr_ratio: has no effect on full fine-tuning (lora=None)")
        if self.full.weights == "stochastic" and self.model.dtype == "float16":
            faults.append("full.weights='stochastic': rounds to bfloat16 only, and model.dtype is float16")
        return faults

    def _data_faults(self) -> list[str]:
        task = self.task is not None
        faults = []
        if task and not ALGORITHMS[self.algorithm].samples:
            able = _listed(name for name, one in ALGORITHMS.items() if one.samples)
            faults.append(f"data.path is {self.data.path!r}: tasks are for {able}, not for {self.algorithm}")
        if self.train.eval_every and not (self.data.evaluation or task):
            faults.append(
                f"train.eval_every is {self.train.eval_every}, so data.eval_path (or data.eval_share) is required"
            )
        overlap = self.data.window_overlap
        if overlap is not None and overlap >= self.train.seq_len:
            faults.append(
                f"data.window_overlap: found {overlap}, expected less than train.seq_len={self.train.seq_len}"
            )
        return faults

    def _idle_groups(self) -> list[str]:
        """A fault for each group with changed settings that the run's algorithm does not use."""
        faults = []
        for name in sorted(GROUPS.keys() - ALGORITHMS[self.algorithm].groups.keys()):
            group = getattr(self, name)
            if changed := [
                f"{name}.{key}" for key, value in vars(group).items() if value != getattr(type(group)(), key)
            ]:
                faults.append(f"{', '.join(changed)}: has no effect with algorithm={self.algorithm!r}")
        return faults


def foreign(own: Mapping[str, Any]) -> list[str]:
    """A fault for each setting that all adapters of a run share, and for each value that is not a group of settings."""
    groups, faults = [name.partition(".")[0] for name in OWN], []
    for group, values in own.items():
        if not isinstance(values, Mapping):
            faults.append(f"{group}: found {values!r}, expected a group of settings")
        elif group not in OWN:
            names = [f"{group}.{key}" for key in values] or [group]
            faults += [
                f"{name}: is the same for all adapters of a run; their own may be {', '.join(OWN)}"
                for name in names
                if name not in (*OWN, *groups)
            ]
    return faults


def trained_alone(algorithm: str) -> list[str]:
    """A fault if the algorithm cannot train adapters side by side."""
    if ALGORITHMS[algorithm].side_by_side:
        return []
    able = _listed(name for name, one in ALGORITHMS.items() if one.side_by_side)
    return [f"adapters: several are trained side by side by {able}; train those of {algorithm} alone"]


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names)


def default_config() -> ConfigDict:
    """Every setting at its default, as a ConfigDict for recipes to change; required settings are None until given.

    Assignments are not checked: `resolve` reports everything that is wrong at once.
    """
    return _defaults(RunConfig)


def resolve(config: ConfigDict | Mapping[str, Any]) -> RunConfig:
    """The settings as frozen dataclasses.

    Raises:
        ValueError: unknown keys, wrong types, missing settings, or incompatible settings; all in one message.
    """
    values = plain_values(config)
    shared = values.get("data") or {}
    if (
        values.get("adapters")
        and isinstance(shared, Mapping)
        and shared.get("path") is None
        and not shared.get("sources")
    ):
        values["data"] = {**shared, "path": EACH}
    run_config, faults = typed.build(RunConfig, values)
    faults = typed.unknown_keys(RunConfig, values) + faults
    if faults:
        raise UserError("the settings are invalid:\n  " + "\n  ".join(faults))
    return run_config


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings written by an older version of jlora, with defaults for those it did not have."""
    return _completed(RunConfig, settings)


def _completed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    missing = {f.name: f for f in dataclasses.fields(cls) if f.name not in values and not typed.is_required(f)}
    found = dict(values) | {name: _default(field) for name, field in missing.items()}
    for name, hint in typing.get_type_hints(cls).items():
        group, each, value = typed.group_type(hint), typed.each_type(hint), found.get(name)
        if group and isinstance(value, Mapping):
            found[name] = _completed(group, value)
        elif each and isinstance(value, Mapping):
            found[name] = {key: _completed(each, one) for key, one in value.items()}
    return json.loads(json.dumps(found, default=dataclasses.asdict))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The settings as plain values for config.json; `resolve` turns them back into the same RunConfig."""
    return dataclasses.asdict(config)


def _defaults(cls: type) -> ConfigDict:
    """A ConfigDict that knows the type of each field.

    For the command line, where fields of mixed types are given as Python literals.
    """
    config = ConfigDict(type_safe=False)
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if group := typed.group_of(field, hint):
            config[field.name] = _defaults(group)
        else:
            config[field.name] = FieldReference(_default(field), field_type=_scalar(hint))
    return config


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if typed.is_required(field) else field.default


def _scalar(hint: Any) -> type:
    """str for `str`, with or without None or several of it; object for anything that is not a single scalar type."""
    none = (type(None), tuple[str, ...])
    members = [member for member in typing.get_args(hint) or (hint,) if member not in none]
    return members[0] if len(members) == 1 and members[0] in (bool, int, float, str) else object


def plain_values(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The settings as nested plain dicts.

    A required placeholder that was not given becomes None, which `typed.build` reports as missing.
    """
    references = config.items(preserve_field_references=True) if isinstance(config, ConfigDict) else config.items()
    plain = {}
    for key, value in references:
        if isinstance(value, FieldReference):
            value = _value(value)
        plain[key] = plain_values(value) if isinstance(value, ConfigDict | Mapping) else value
    return plain


def _value(reference: FieldReference) -> Any:
    try:
        return reference.get()
    except RequiredValueError:
        return None
