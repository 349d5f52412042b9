"""Whether a workdir's run may be resumed: with the same settings, files, tokens and date as it began with."""

import dataclasses
import datetime
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora import checkpoint, data, hub
from jlora.errors import UserError, number_of
from jlora.train.algorithms.algorithm import Note, Plan
from jlora.train.config import RunConfig, completed, to_dict
from jlora.types import Params

# What may differ when a run is resumed: how long it goes on, how it is watched, where it runs and what it tolerates,
# but not what it computes. None stands for the whole group.
FREE = {
    "mesh": None,
    "model": ("attention",),
    "rollout": ("on_error", "log_completions"),
    "train": (
        *("log_every", "save_every", "keep_checkpoints", "eval_every", "eval_on_start", "remat"),
        *("tensorboard", "trackers", "project", "run_name"),
        *("metrics", "metric_tokens", "best_metric", "greater_is_better", "load_best", "patience", "profile"),
        *("fold", "experts", "on_nonfinite", "max_rise", "on_changed_files", "steps", "epochs"),
    ),
    "data": ("eval_path", "on_error", "cache"),
}
CONTENTS = "contents of "
EVALUATION = f"{CONTENTS}data.eval_path"
DATE = "date that templates see"
# The checkpoints of older versions do not record its contents.
ADAPTER_CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class Begun:
    """What a workdir holds of a run: nothing before the first checkpoint.

    Attributes:
        step: the newest checkpoint's; None if there is none.
        settings: those of config.json, with today's defaults for settings it does not have; {} if it is missing.
        manifest: the checkpoint's.
        fixed: the adapters' frozen half as the run began.
    """

    folder: pathlib.Path
    step: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Params = dataclasses.field(default_factory=dict)

    @property
    def date(self) -> datetime.datetime:
        """The date that chat templates see: the date when the run began, which a resume on another day keeps."""
        text = self.manifest.get(DATE)
        return datetime.datetime.fromisoformat(text) if text else _now()


def read_begun(folder: pathlib.Path) -> Begun:
    """The run of the workdir.

    Raises:
        UserError: another version of jlora saved it.
    """
    step, manifest, fixed = checkpoint.newest(folder / "checkpoints")
    path = folder / "config.json"
    if step is None:
        return Begun(folder)
    settings = completed(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    return Begun(folder, step, settings, manifest, fixed)


def with_dtype(begun: Begun, config: RunConfig) -> RunConfig:
    """The settings with a dtype in place of None, so that it does not change on other devices.

    It is that of the run in the workdir or, for a new run, the one that these devices multiply fastest.
    """
    if config.model.dtype is not None:
        return config
    dtype = begun.settings.get("model", {}).get("dtype") or hub.float_dtype(None).name
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def refuse_other_settings(begun: Begun, config: RunConfig) -> None:
    """Raises UserError if the workdir holds a run whose settings differ in anything other than `FREE`."""
    if begun.step is None:
        return
    expected = json.loads(json.dumps(to_dict(config)))
    if begun.settings:
        found, expected = _fixed(begun.settings), _fixed(expected)
    else:  # without config.json, compare what the checkpoint itself says about the adapter
        found = {"lora": begun.manifest.get("lora", {})}
        expected = {"lora": {name: (expected["lora"] or {}).get(name) for name in found["lora"]}}
    if differences := checkpoint.compare(found, expected):
        raise UserError(
            f"{begun.folder} belongs to a run with other settings; choose another workdir, or give the same settings:"
            "\n  " + "\n  ".join(differences)
        )


def refuse_other_files(begun: Begun, manifest: Mapping[str, Any], tell: Note | None = None) -> None:
    """Raises UserError if files, tokens or the tokenizer are not those that the run began with; all changes are named.

    What the checkpoint does not record (older versions recorded less) is not checked. Evaluation may switch to another
    file.

    Args:
        tell: if given, it is told about the changes and nothing is raised.
    """
    wanted = json.loads(json.dumps(manifest))
    shared = {name: value for name, value in wanted.items() if name in begun.manifest and name != DATE}
    found = {name: begun.manifest[name] for name in shared}
    if EVALUATION in shared:
        both = found[EVALUATION].keys() & shared[EVALUATION].keys()
        for side in (found, shared):
            side[EVALUATION] = {path: side[EVALUATION][path] for path in both}
    if faults := list(_changes(found, shared)):
        if tell:
            tell("resuming although these have changed since the run began:\n  " + "\n  ".join(faults))
            return
        raise UserError(
            f"{begun.folder} belongs to another run: what it began with has changed; restore it, choose another "
            "workdir, or accept the change with train.on_changed_files=note:\n  " + "\n  ".join(faults)
        )


def refuse_fewer_steps(begun: Begun, total_steps: int, note: Note) -> None:
    """Raises UserError if the run has already done more steps than are now asked for.

    If their number changed, notes what that means.

    Args:
        total_steps: the steps that are now asked for.
    """
    if begun.step is None:
        return
    if total_steps < begun.step:
        raise UserError(
            f"{begun.folder} holds a run that has done {number_of(begun.step, 'step')}, and the settings ask "
            f"for {total_steps}: expected at least as many; train.steps and train.epochs can be raised"
        )
    before = begun.manifest.get("steps")
    if before is not None and before != total_steps:
        note(
            f"the run was to have {number_of(before, 'step')} and now has {total_steps}: from step "
            f"{begun.step + 1} on the learning rate is that of a schedule over {number_of(total_steps, 'step')}"
        )


def manifest(config: RunConfig, tokenizer: Any, plan: Plan, date: datetime.datetime) -> dict[str, Any]:
    """What identifies the run that a checkpoint belongs to, besides its base: settings, files, tokenizer and tokens."""
    runs = list(config.members().values()) if config.adapters else [config]
    read = {
        "data.path": [one.data.train for one in runs if one.task is None],
        "data.eval_path": [one.data.evaluation for one in runs if one.data.evaluation],
    }
    contents = {f"{CONTENTS}{setting}": _digests(sources) for setting, sources in read.items()}
    named = {
        "model.adapter": {str(file) for one in runs if one.model.adapter for file in _weights(one.model.adapter)},
        "rollout.rewards": {match[0] for name in config.rollout.rewards if (match := re.search(r"[^:]+\.py", name))},
        "rollout.reward_model": {str(file) for file in _weights(config.rollout.reward_model or "")},
    }
    contents |= {
        f"{CONTENTS}{setting}": {path: data.digest(path) for path in sorted(paths) if pathlib.Path(path).exists()}
        for setting, paths in named.items()
    }
    return contents | {
        "lora": to_dict(config)["lora"] or {},
        "chat template": _checksum(tokenizer.chat_template),
        "vocabulary": _checksum([sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]),
        "tokens of the data": plan.tokens,
        "steps": plan.total_steps,
        DATE: date.isoformat(),
    }


def _digests(given: Iterable[data.Sources]) -> dict[str, str]:
    return {name: digest for sources in given for name, digest in sources.digests().items()}


def _now() -> datetime.datetime:
    """The first process's time, to the second: all processes must see one date, but clocks and time zones differ."""
    now = datetime.datetime.now().replace(microsecond=0)
    if jax.process_count() == 1:
        return now
    told = multihost_utils.broadcast_one_to_all(np.array(now.timetuple()[:6], np.int32))
    return datetime.datetime(*map(int, told))


def _weights(folder: str) -> list[pathlib.Path]:
    if not folder:
        return []
    return [*sorted(pathlib.Path(folder).glob("*.safetensors")), *pathlib.Path(folder).glob(ADAPTER_CONFIG)]


def _checksum(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def _changes(found: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(given.keys() - {"steps", "lora"}):  # settings are compared by `refuse_other_settings`
        if name.startswith(CONTENTS):
            for path in sorted(found[name].keys() | given[name].keys()):
                unknown = path not in found[name] and pathlib.Path(path).name == ADAPTER_CONFIG
                if not unknown and found[name].get(path) != given[name].get(path):
                    yield f"{name}: {path} has changed"
        elif found[name] != given[name]:
            hint = " (by the tokenizer's files, or another version of jlora, transformers or tokenizers)"
            yield f"{name}: has changed" if name != "tokens of the data" else f"{name}: have changed{hint}"


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        group: {name: value for name, value in values.items() if name not in FREE.get(group, ())}
        if isinstance(values, dict)
        else values
        for group, values in settings.items()
        if FREE.get(group, ()) is not None
    }
