"""The record of a run: metrics.jsonl (one object per step), trackers that get the same numbers, and curves.png."""

import importlib.util
import itertools
import json
import math
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora.errors import MissingFileError, UserError
from jlora.train.reporting.trackers import Ended, Tracker
from jlora.types import require

FILE = "metrics.jsonl"
CURVES = "curves.png"

INK, BLUE, ORANGE, GREEN, GRID = "#333333", "#2563a8", "#d9641e", "#3b8f4a", "#e4e4e4"
LINES = (BLUE, ORANGE, GREEN, "#8e44ad", "#b3261e", "#139a9a", "#8a6d00", "#d6338a", "#7a7a7a", "#142f5c")

Panels = Sequence[tuple[str, tuple[str, ...]]]


class MetricsWriter:
    """Appends to metrics.jsonl, after removing what it holds about steps that a resumed run will repeat.

    Args:
        workdir: created if it does not exist.
        start_step: the step that the run resumes after; objects of later steps are removed.
        trackers: also get the numbers that are finite.
    """

    def __init__(self, workdir: str | os.PathLike, *, start_step: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._trackers = trackers
        truncate(folder / FILE, start_step)
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds one object: the step and the values as plain numbers; NaN and infinities, which JSON lacks, as null."""
        numbers = {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
        self._file.flush()
        known = {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(step, known)

    def close(self, ended: Ended = "finished") -> None:
        """Closes the file and the trackers; closing twice is fine."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close(ended)
        self._trackers = ()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        self.close("finished" if kind is None else "failed")


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl in order, without a last line that a crash cut short.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: lines are not JSON; all are listed.
    """
    path = pathlib.Path(workdir) / FILE
    if not path.exists():
        raise MissingFileError(
            f"{path} does not exist: {workdir} is not the workdir of a run, or nothing was logged yet"
        )
    return _parse(path)


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[int | float]]:
    """(steps, values) of a number, where it is recorded and finite."""
    pairs = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` values around each value, or of as many as there are near the ends."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    centre = np.arange(len(values))
    first, last = np.maximum(centre - window // 2, 0), np.minimum(centre + window // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def can_plot() -> bool:
    """Whether matplotlib (the extra `plots`) is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_curves(workdir: str | os.PathLike, panels: Panels = ()) -> pathlib.Path:
    """Draws loss, learning rate, gradient norm and `panels` by step from metrics.jsonl; returns the path of curves.png.

    Args:
        panels: (title, names of numbers) of each further panel; the evaluation's numbers of the same names are drawn
            with them.
    """
    records = read_metrics(workdir)
    basic = (("Learning rate", ("learning_rate",)), ("Gradient norm (before clipping)", ("grad_norm",)))
    shown = (("Loss", ("loss",)), *panels, *basic)
    columns = 2 if len(shown) <= 4 else 3
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(rows, columns, (5.5 * columns, 3.3 * rows))
    for axis, (title, names) in zip(axes, shown, strict=False):
        _draw(axis, records, title, names)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis in axes[len(shown) - columns : len(shown)]:
        axis.set_xlabel("step", color=INK)
    path = pathlib.Path(workdir) / CURVES
    save_figure(figure, path)
    return path


def new_figure(rows: int, columns: int, size: tuple[int | float, int | float]) -> tuple[Any, Any]:
    """(a matplotlib figure, its axes in reading order)."""
    figure = require("matplotlib.figure", "plots").Figure(figsize=size, layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def save_figure(figure: Any, path: pathlib.Path) -> None:
    """Writes a PNG, without matplotlib's version in it, so that the same numbers give the same bytes."""
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, format="png", dpi=130, metadata={"Software": None})
    os.replace(part, path)


def style(axis: Any, title: str) -> None:
    """Gives an axis its title and the look of every plot."""
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    axis.tick_params(colors=INK, labelsize=9)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw(axis: Any, records: list[dict], title: str, names: tuple[str, ...]) -> None:
    """Draws the curves of some numbers; those with many values are smoothed, over a faint line of the raw values."""
    style(axis, title)
    axis.xaxis.get_major_locator().set_params(integer=True)
    drawn = 0
    for name, color in zip(names, itertools.cycle(LINES), strict=False):
        label = name.rpartition("/")[2].replace("_", " ") if len(names) > 1 else "training"
        drawn += _draw_line(axis, *series(records, name), color, label)
        drawn += _draw_evaluation(axis, *series(records, f"eval_{name}"), ORANGE if len(names) == 1 else color)
    if not drawn:
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", color="#999999")
    elif drawn > 1:
        _add_legend(axis, beside=len(names) > 3)


def _add_legend(axis: Any, *, beside: bool) -> None:
    """Adds a legend, in which lines of one label are one; `beside` the axis it hides none of many lines."""
    handles, labels = axis.get_legend_handles_labels()
    once = dict(sorted(zip(labels, handles, strict=True), key=lambda one: one[0] == "evaluation"))
    place = dict(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7.5) if beside else dict(loc="best", fontsize=9)
    axis.legend(once.values(), once, frameon=False, labelcolor=INK, **place)


def _draw_line(axis: Any, steps: list[int], values: list[float], color: str, label: str) -> bool:
    window = max(1, len(values) // 20)
    if window > 1:
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.9)
        values = smooth(values, window)
    axis.plot(steps, values, "o-" if len(values) == 1 else "-", color=color, linewidth=1.6, label=label)
    return bool(steps)


def _draw_evaluation(axis: Any, steps: list[int], values: list[float], color: str) -> bool:
    if steps:
        axis.plot(steps, values, "o--", color=color, markersize=4.5, linewidth=1.2, label="evaluation")
    return bool(steps)


def truncate(path: pathlib.Path, last_step: int) -> None:
    """Keeps the objects up to `last_step`, atomically: the file is the old one or the new one, never half of either."""
    if not path.exists():
        return
    kept = [record for record in _parse(path) if record["step"] <= last_step]
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")
    os.replace(part, path)


def _parse(path: pathlib.Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    # Every object ends in a newline, so what follows the last newline is empty or was cut short by a crash.
    records, faults = [], []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            faults.append(f"{path}:{number}: not JSON: {error.msg}")
    if faults:
        raise UserError("the metrics cannot be read:\n  " + "\n  ".join(faults))
    return records


def _plain(value: Any) -> int | float | str | None:
    """The value as a Python number, or None if it is not finite; strings stay.

    A step returns arrays of one element and NumPy scalars.
    """
    if isinstance(value, str) or value is None:
        return value
    number = value.item() if hasattr(value, "item") else value
    return number if not isinstance(number, float) or math.isfinite(number) else None
