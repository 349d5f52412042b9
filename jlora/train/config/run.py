"""The settings of a run: one dataclass that holds every group's, and how to get there from a ConfigDict.

Defaults live in the dataclasses alone; recipes start from `default_config()` and change what differs.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import RequiredValueError

from jlora.data import DataConfig
from jlora.errors import UserError, raise_all
from jlora.hub.checkpoints.resize import check_vocab
from jlora.kernels.attention import AUTO, FORMS
from jlora.lora import LoraConfig
from jlora.optim import OptimConfig
from jlora.quant import QuantConfig, as_config
from jlora.sharding import MeshConfig
from jlora.train.config import typed
from jlora.train.config.settings import (
    CPOConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ORPOConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
)

# The groups that an algorithm has in addition to those of every run.
GROUPS = {
    "sft": (),
    "dpo": ("dpo",),
    "cpo": ("cpo",),
    "orpo": ("orpo",),
    "kto": ("kto",),
    "reward": ("reward",),
    "grpo": ("rollout", "grpo"),
    "ppo": ("rollout", "ppo"),
}
TASK = "reasoning_gym:"  # prefix of a data.path that names a generated task
EACH = "each adapter's own"  # the run's data.path if its adapters share no data

# What may differ between the adapters of one run: groups, or settings of a group.
OWN = ("data", "lora", "model.adapter", "optim.learning_rate", "train.seed")

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the base model comes from and how it is held.

    Args:
        path: a Hugging Face folder, a Hub id, or a GGUF file.
        dtype: of computation and of unquantised weights. None: bfloat16 on TPU and GPU, float32 on CPU; a resumed run
            keeps the one it began with.
        quant: "nf4", "fp4", "int4", "int8", a QuantConfig, or None for the weights as the checkpoint has them.
        adapter: a PEFT folder to continue from; its settings replace the group `lora`.
        resize_vocab: rows of embedding and head; "tokenizer": as many as the tokenizer needs; None: unchanged. New rows
            are the mean of the others; lora.trainable_token_indices or modules_to_save train them.
        attention: the form that computes it (`jlora.kernels.attention.FORMS`); "auto" picks the best for the device.
    """

    path: str
    dtype: str | None = None
    quant: str | QuantConfig | None = None
    adapter: str | None = None
    resize_vocab: int | str | None = None
    attention: str = AUTO

    @property
    def merges_packed(self) -> bool:
        """Whether the adapter is trained to be merged into the base and packed with it."""
        return isinstance(self.quant, QuantConfig) and self.quant.merge_aware

    def __post_init__(self) -> None:
        faults = []
        if not self.path:
            faults.append("model.path: found '', expected a folder, a Hub id or a GGUF file")
        if self.dtype not in (None, *DTYPES):
            faults.append(f"model.dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}, or None")
        if self.attention not in (AUTO, *FORMS):
            faults.append(f"model.attention: found {self.attention!r}, expected one of {', '.join((AUTO, *FORMS))}")
        try:
            as_config(self.quant)
        except UserError as error:
            faults.append(f"model.quant: {error}")
        try:
            check_vocab(self.resize_vocab, "model.resize_vocab")
        except UserError as error:
            faults.append(str(error))
        raise_all(faults)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, how much to compute at once, and how often to log, save and evaluate.

    Args:
        steps, epochs: when the run ends, whichever comes first; at least one is required. A fraction of an epoch is
            that fraction of its rows, rounded up to whole steps.
        batch_size: rows of a micro-batch, over all devices.
        seq_len: tokens of a row.
        grad_accum: micro-batches of a step.
        seed: of the adapter's initialisation, the order of the data, and dropout.
        log_every, save_every, eval_every: in steps; eval_every=0 never evaluates.
        eval_on_start: also evaluate before the first step, so that the log shows what training changed.
        keep_checkpoints: how many to keep; older ones are removed.
        remat: which of a layer's activations are kept for the backward pass: "full" keeps the layer's input and
            computes the rest again, "offload" does the same with the inputs in host memory, "none" keeps what is
            expensive to compute. True means "full", False "none".
        on_nonfinite: what to do when the loss, the gradient or the adapter is no longer finite: "stop" the run with its
            last checkpoint kept, or "skip" the step (ten in a row stop the run). Other adapters of the run continue.
        on_changed_files: what a resumed run does when its data, rewards or tokenizer have changed: "refuse", or "note"
            what changed and continue.
        tensorboard: also write TensorBoard files (needs the extra of that name).
        profile: number of steps to trace, after the first two; see `jlora.train.reporting.tracing`.
        fold: save the adapter with one rank and one scale for all modules, like `jlora export --fold`.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    seq_len: int = 512
    grad_accum: int = 1
    seed: int = 0
    log_every: int = 1
    save_every: int = 100
    keep_checkpoints: int = 2
    eval_every: int = 0
    eval_on_start: bool = False
    remat: bool | Literal["full", "offload", "none"] = True
    tensorboard: bool = False
    profile: int = 0
    fold: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    on_changed_files: Literal["refuse", "note"] = "refuse"

    def __post_init__(self) -> None:
        faults = []
        if self.steps is None and self.epochs is None:
            faults.append("train.steps or train.epochs: one of them is required")
        if self.epochs is not None and not self.epochs > 0:
            faults.append(f"train.epochs: found {self.epochs}, expected more than 0")
        least = {"steps": 1, "batch_size": 1, "seq_len": 2, "grad_accum": 1, "log_every": 1, "save_every": 1}
        least |= {"keep_checkpoints": 1, "eval_every": 0, "seed": 0, "profile": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                faults.append(f"train.{name}: found {value}, expected at least {bound}")
        raise_all(faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run does.

    Args:
        adapters: several adapters to train side by side on one base, by name, each with its own settings (`OWN`):
            {"shop": {"data": {"path": "shop.jsonl"}, "optim": {"learning_rate": 1e-4}}, "law": …}.
    """

    algorithm: Literal["sft", "dpo", "cpo", "orpo", "kto", "reward", "grpo", "ppo"] = "sft"
    model: ModelSource
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    dpo: DPOConfig = DPOConfig()
    cpo: CPOConfig = CPOConfig()
    orpo: ORPOConfig = ORPOConfig()
    kto: KTOConfig = KTOConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GRPOConfig = GRPOConfig()
    ppo: PPOConfig = PPOConfig()
    adapters: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def members(self) -> dict[str, "RunConfig"]:
        """The settings under which each of `adapters` would be trained alone, by name. Names are sorted, because the
        order of adapters in a checkpoint follows them, whatever order a recipe uses.

        Raises:
            ValueError: settings that cannot be an adapter's own, or are invalid; all are listed.
        """
        members, faults = {}, []
        shared = dataclasses.asdict(self) | {"adapters": {}}
        if self.data.path == EACH:
            shared["data"]["path"] = None
        for name, own in sorted(self.adapters.items()):
            found = _foreign(own)
            merged = {
                group: value | own[group] if isinstance(value, dict) and isinstance(own.get(group), Mapping) else value
                for group, value in shared.items()
            }
            if not found:
                members[name], found = typed.build(RunConfig, merged)
                found += typed.unknown_keys(RunConfig, merged)
                if not found and members[name].data.system != self.data.system:
                    found = [f"data.system: expected {self.data.system!r} as of the run, whose tokenizer is theirs all"]
            faults += [f"adapters[{name!r}]: {fault}" for fault in found]
        raise_all(faults)
        return members

    def _adapter_faults(self) -> list[str]:
        faults = [
            f"adapters: found the name {name!r}, expected letters, digits, '_', '-' and '.', since it names a folder"
            for name in self.adapters
            if not re.fullmatch(r"[\w-][\w.-]*", name)
        ]
        if self.algorithm != "sft":
            faults.append(f"adapters: several are trained side by side by sft; train those of {self.algorithm} alone")
        try:
            self.members()
        except UserError as error:
            faults.append(str(error))
        return faults

    def __post_init__(self) -> None:
        faults = self._adapter_faults() if self.adapters else []
        faults += self._idle_groups() + (self._rollout_faults() if "rollout" in GROUPS[self.algorithm] else [])
        faults += [] if self.adapters else self._data_faults()
        if self.model.merges_packed and self.lora.lora_dropout:
            faults.append(
                "lora.lora_dropout: the packed sum of base and adapter (merge_aware) cannot drop inputs; set 0"
            )
        if self.train.eval_on_start and not self.train.eval_every:
            faults.append("train.eval_on_start: has no effect without train.eval_every")
        raise_all(faults)

    def _data_faults(self) -> list[str]:
        task = self.data.path.startswith(TASK)
        faults = []
        if task and "rollout" not in GROUPS[self.algorithm]:
            faults.append(f"data.path is {self.data.path!r}: tasks are for grpo and ppo, not for {self.algorithm}")
        if self.train.eval_every and not (self.data.eval_path or task):
            faults.append(f"train.eval_every is {self.train.eval_every}, so data.eval_path is required")
        return faults

    def _idle_groups(self) -> list[str]:
        """A fault for each group with changed settings that the run's algorithm does not use."""
        used = GROUPS[self.algorithm]
        faults = []
        for name in sorted({name for names in GROUPS.values() for name in names} - set(used)):
            group = getattr(self, name)
            if changed := [
                f"{name}.{key}" for key, value in vars(group).items() if value != getattr(type(group)(), key)
            ]:
                faults.append(f"{', '.join(changed)}: has no effect with algorithm={self.algorithm!r}")
        return faults

    def _rollout_faults(self) -> list[str]:
        rollout, train = self.rollout, self.train
        completions = train.batch_size * train.grad_accum
        if self.algorithm == "grpo":
            completions *= self.grpo.steps_per_generation
        else:
            completions *= self.ppo.num_mini_batches
        faults = []
        if completions % rollout.num_generations:
            faults.append(
                f"a rollout has {completions} completions: not a multiple of rollout.num_generations = "
                f"{rollout.num_generations}; change train.batch_size or train.grad_accum"
            )
        if rollout.max_completion_length >= train.seq_len:
            faults.append(
                f"rollout.max_completion_length is {rollout.max_completion_length}: leaves no room for a prompt in "
                f"train.seq_len = {train.seq_len}"
            )
        if self.algorithm == "grpo" and self.grpo.overlong_cache > rollout.max_completion_length:
            faults.append(
                f"grpo.overlong_cache is {self.grpo.overlong_cache}: expected at most rollout.max_completion_length = "
                f"{rollout.max_completion_length}"
            )
        if not rollout.rewards and not self.data.path.startswith(TASK):
            faults.append("rollout.rewards: found none, expected at least one")
        if self.algorithm == "grpo" and self.grpo.advantage != "reinforce++" and rollout.num_generations < 2:
            faults.append(
                f"rollout.num_generations: found 1, expected 2 or more with {self.grpo.advantage!r} advantages"
            )
        if train.steps is None:
            faults.append("train.steps: is required, since rollouts have no end")
        return faults


def _foreign(own: Mapping[str, Any]) -> list[str]:
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
    values = _plain(config)
    shared = values.get("data") or {}
    if values.get("adapters") and isinstance(shared, Mapping) and shared.get("path") is None:
        values["data"] = {**shared, "path": EACH}
    run_config, faults = typed.build(RunConfig, values)
    faults = typed.unknown_keys(RunConfig, values) + faults
    if faults:
        raise UserError("the settings do not hold:\n  " + "\n  ".join(faults))
    return run_config


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings written by an older version of jlora, with defaults for those it did not have."""
    return _completed(RunConfig, settings)


def _completed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    missing = {f.name: f for f in dataclasses.fields(cls) if f.name not in values and not typed.is_required(f)}
    found = dict(values) | {name: _default(field) for name, field in missing.items()}
    for name, hint in typing.get_type_hints(cls).items():
        members = [member for member in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(member)]
        value = found.get(name)
        if members and isinstance(value, Mapping):
            found[name] = _completed(members[0], value)
    return json.loads(json.dumps(found, default=dataclasses.asdict))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The settings as plain values for config.json; `resolve` turns them back into the same RunConfig."""
    return dataclasses.asdict(config)


def _defaults(cls: type) -> ConfigDict:
    """A ConfigDict that knows the type of each field, for the command line, where fields of mixed types are given as
    Python literals.
    """
    config = ConfigDict(type_safe=False)
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            config[field.name] = _defaults(hint)
        else:
            config[field.name] = FieldReference(_default(field), field_type=_scalar(hint))
    return config


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if typed.is_required(field) else field.default


def _scalar(hint: Any) -> type:
    """str for `str` and `str | None`; object for anything that is not a single scalar type."""
    members = [member for member in typing.get_args(hint) or (hint,) if member is not type(None)]
    return members[0] if len(members) == 1 and members[0] in (bool, int, float, str) else object


def _plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The settings as nested plain dicts. A required placeholder that was not given becomes None, which `typed.build`
    reports as missing.
    """
    references = config.items(preserve_field_references=True) if isinstance(config, ConfigDict) else config.items()
    plain = {}
    for key, value in references:
        if isinstance(value, FieldReference):
            value = _value(value)
        plain[key] = _plain(value) if isinstance(value, ConfigDict | Mapping) else value
    return plain


def _value(reference: FieldReference) -> Any:
    try:
        return reference.get()
    except RequiredValueError:
        return None
