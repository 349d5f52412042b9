"""Several runs side by side: how their settings differ, what came of them, and their curves in one plot."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors

from jlora.errors import MissingFileError, UserError, raise_all
from jlora.train.best import FILE as BEST
from jlora.train.config import to_dict
from jlora.train.many import FOLDER
from jlora.train.reporting.metrics import INK, new_figure, read_metrics, save_figure, series, smooth, style
from jlora.train.reporting.trackers import flat
from jlora.train.restore import read_config
from jlora.train.results import MODEL

# What says nothing about a run but how it was watched.
UNSEEN = ("train.project", "train.run_name", "train.trackers", "train.tensorboard", "train.profile")
# Counts of the evaluation, which are the same at every step.
COUNTS = ("eval_tokens", "eval_n", "eval_dropped")
# Panels of the plot besides the loss.
MOST_PANELS = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, or one adapter of a run of several.

    Attributes:
        settings: by dotted name.
        records: of metrics.jsonl; numbers of this adapter have their plain names.
        usage: of usage.json; {} before the end.
        best: of best.json, if the run looked for a best step.
        finished: whether it has left an adapter, or a model.
    """

    name: str
    workdir: pathlib.Path
    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    usage: Mapping[str, Any]
    best: Mapping[str, Any] | None
    finished: bool

    def numbers(self) -> dict[str, Any]:
        """What came of it, without what is not known: the loss is the mean of the last twentieth of the steps."""
        losses = series(self.records, "loss")[1]
        last = losses[-max(1, len(losses) // 20) :]
        known = {
            "steps": max((record["step"] for record in self.records), default=0),
            "loss": math.fsum(last) / len(last) if last else None,
            **{name: series(self.records, name)[1][-1] for name in self.evaluated()},
            "best": dict(self.best) if self.best else None,
            "tokens": next(iter(series(self.records, "num_tokens")[1][-1:]), None),
            **{name: self.usage.get(name) for name in ("tokens_per_second", "peak_bytes", "trainable_parameters")},
        }
        return {name: value for name, value in known.items() if value is not None}

    def evaluated(self) -> list[str]:
        """The names of the evaluation's numbers, without counts, in their order."""
        names = dict.fromkeys(name for record in self.records for name in record if name.startswith("eval_"))
        return [name for name in names if name not in COUNTS and series(self.records, name)[1]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        differing: the names of the settings that are not the same in all of them.
        remarks: what to know when they are compared.
    """

    runs: Sequence[Run]
    differing: Sequence[str]
    remarks: Sequence[str]

    def rows(self) -> list[dict[str, Any]]:
        """One object a run: name, workdir, whether it has finished, the settings that differ, and its numbers."""
        return [
            {
                "name": run.name,
                "workdir": str(run.workdir),
                "finished": run.finished,
                "settings": {name: run.settings.get(name) for name in self.differing},
            }
            | run.numbers()
            for run in self.runs
        ]


def compare(workdirs: Sequence[str | os.PathLike]) -> Comparison:
    """The runs of these workdirs, each once; each adapter of a run of several is a run of its own.

    Raises:
        UserError: folders are not workdirs of runs, or hold none that has logged a step; all are listed.
    """
    folders = list({pathlib.Path(folder).resolve(): pathlib.Path(folder) for folder in workdirs}.values())
    runs, faults = [], []
    for folder, name in zip(folders, _names(folders), strict=True):
        try:
            runs += read_runs(folder, name)
        except UserError as error:
            faults.append(str(error))
    raise_all(faults)
    known = dict.fromkeys(name for run in runs for name in run.settings if name not in UNSEEN)
    differing = [name for name in known if len({repr(run.settings.get(name)) for run in runs}) > 1]
    return Comparison(runs, differing, list(_remarks(runs)))


def read_runs(folder: pathlib.Path, name: str) -> list[Run]:
    """The run of the workdir, under this name; of a run of several adapters, each adapter's.

    Raises:
        UserError: the folder is not the workdir of a run, or has logged no step.
    """
    config = read_config(folder)
    records = read_metrics(folder)
    if not records:
        raise UserError(f"{folder} has logged no step yet")
    usage, best = (_json(folder / file) for file in ("usage.json", BEST))
    if not config.adapters:
        done = (folder / (MODEL if config.lora is None else "adapter")).is_dir()
        return [Run(name, folder, flat(to_dict(config)), records, usage or {}, best, done)]
    runs = []
    for adapter, member in config.members().items():
        own = [_own(record, adapter, config.adapters) for record in records]
        done = (folder / FOLDER / adapter).is_dir()
        # The run's usage counts what all adapters trained.
        used = (usage or {}) | {"trainable_parameters": _count(folder / FOLDER / adapter)}
        runs.append(Run(f"{name}/{adapter}", folder, flat(to_dict(member)), own, used, best, done))
    return runs


def draw(path: pathlib.Path, runs: Sequence[Run]) -> None:
    """Draws the loss of the runs by step, and the first numbers of their evaluations, one panel each.

    Raises:
        ImportError: matplotlib is not installed.
    """
    evaluated = list(dict.fromkeys(name for run in runs for name in run.evaluated()))
    shown = [name for name in evaluated if name != "eval_perplexity" or "eval_loss" not in evaluated]
    names = ["loss", *shown[:MOST_PANELS]]
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure, axes = new_figure(rows, columns, (6.5 * columns, 3.6 * rows))
    for axis, name in zip(axes, names, strict=False):
        style(axis, name.replace("_", " "))
        axis.set_xlabel("step", color=INK)
        axis.xaxis.get_major_locator().set_params(integer=True)
        for number, run in enumerate(runs):
            _draw_run(axis, run, name, number)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    most = min(4, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=most, frameon=False, labelcolor=INK, fontsize=9)
    save_figure(figure, path)


def _draw_run(axis: Any, run: Run, name: str, number: int) -> None:
    steps, values = series(run.records, name)
    look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4], "linewidth": 1.5}
    if name == "loss":
        window = max(1, len(values) // 20)
        if window > 1:
            axis.plot(steps, values, **look | {"alpha": 0.15, "linewidth": 0.8})
            values = smooth(values, window)
    marker = "o" if name != "loss" or len(values) == 1 else ""
    axis.plot(steps, values, marker=marker, markersize=4, label=run.name, **look)


def _count(adapter: pathlib.Path) -> int | None:
    """The parameters in an adapter's folder; None if there is no file yet."""
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with safetensors.safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no dict)


def _own(record: Mapping[str, Any], adapter: str, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """A record as that of one adapter: its own numbers in place of the means, and none of the others'."""
    shared = {key: value for key, value in record.items() if key.rpartition("/")[2] not in adapters}
    own = {key.rpartition("/")[0]: value for key, value in record.items() if key.rpartition("/")[2] == adapter}
    return shared | own


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg}") from error


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise MissingFileError("found no folders, expected workdirs of runs")


def _remarks(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if not run.finished:
            asked = run.settings.get("train.steps")
            total = f" of {asked}" if asked else ""
            yield f"{run.name} has not finished: it is at step {run.numbers()['steps']}{total}"
    if len(kinds := sorted({run.settings["algorithm"] for run in runs})) > 1:
        yield f"their losses are not the same quantity: {', '.join(kinds)}"
    held_out = {run.settings.get("data.eval_path") for run in runs if run.evaluated()}
    if len(held_out) > 1:
        yield f"they were evaluated on different data: {', '.join(sorted(map(str, held_out)))}"
