"""The record of a run: metrics.jsonl (one object a step), TensorBoard files when asked for, and curves.png."""

import importlib.util
import json
import math
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora.types import require

FILE = "metrics.jsonl"
CURVES = "curves.png"

INK, BLUE, ORANGE, GRID = "#333333", "#2563a8", "#d9641e", "#e4e4e4"


class MetricsWriter:
    """Appends to metrics.jsonl; a run that resumes first drops what a lost stretch of it had written.

    Args:
      workdir: made if it is not there.
      start_step: the step that the run resumes after; objects of later steps are removed.
      tensorboard: also write the numbers as TensorBoard scalars below `workdir`/tensorboard.
    """

    def __init__(self, workdir: str | os.PathLike, *, start_step: int = 0, tensorboard: bool = False) -> None:
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._board = None
        if tensorboard:
            writer = require("tensorboardX", "tensorboard").SummaryWriter
            self._board = writer(str(folder / "tensorboard"), purge_step=start_step + 1)
        _truncate(folder / FILE, start_step)
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds one object: the step and the values as plain numbers. NaN and infinities, which JSON lacks, are null."""
        numbers = {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files; closing twice is fine."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl in order; a last line that a crash cut short is left out."""
    path = pathlib.Path(workdir) / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: {workdir} is not the workdir of a run, or nothing was logged yet"
        )
    return _parse(path)


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` values around each one, of those that there are near the ends."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    centre = np.arange(len(values))
    first, last = np.maximum(centre - window // 2, 0), np.minimum(centre + window // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def can_plot() -> bool:
    """Whether matplotlib (the extra `plots`) is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_curves(workdir: str | os.PathLike) -> pathlib.Path:
    """The path of curves.png, drawn from metrics.jsonl: loss, learning rate, gradient norm and speed by step."""
    records = read_metrics(workdir)
    figure_module = require("matplotlib.figure", "plots")
    figure = figure_module.Figure(figsize=(11, 6.6), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2, sharex=True).ravel()
    _draw_loss(panels[0], records)
    _draw_line(panels[1], records, "learning_rate", "Learning rate")
    _draw_line(panels[2], records, "grad_norm", "Gradient norm (before clipping)", smoothed=True)
    _draw_line(panels[3], records, "tokens_per_second", "Tokens per second", smoothed=True, from_zero=True)
    for panel in panels[2:]:
        panel.set_xlabel("step", color=INK)
    path = pathlib.Path(workdir) / CURVES
    part = path.with_name(f"{CURVES}.part")
    # Without the version that matplotlib adds, the same numbers give the same bytes.
    figure.savefig(part, format="png", dpi=130, metadata={"Software": None})
    os.replace(part, path)
    return path


def _draw_loss(panel: Any, records: list[dict]) -> None:
    _draw_line(panel, records, "loss", "Loss", smoothed=True, label="training")
    steps, values = _series(records, "eval_loss")
    if steps:
        panel.plot(steps, values, "o-", color=ORANGE, markersize=4.5, linewidth=1.2, label="evaluation")
        panel.legend(frameon=False, labelcolor=INK, loc="upper right")


def _draw_line(
    panel: Any,
    records: list[dict],
    key: str,
    title: str,
    *,
    smoothed: bool = False,
    from_zero: bool = False,
    label: str | None = None,
) -> None:
    """One curve: faint as measured under its smoothed line where it is noisy, plain otherwise."""
    steps, values = _series(records, key)
    panel.set_title(title, loc="left", fontsize=11, color=INK)
    panel.grid(True, color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GRID)
    panel.tick_params(colors=INK, labelsize=9)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.get_major_locator().set_params(integer=True)
    if not steps:
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center", va="center", color="#999999")
        return
    window = max(1, len(values) // 20)
    single = "o-" if len(values) == 1 else "-"
    if smoothed and window > 1:
        panel.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.9)
        values = smooth(values, window)
    panel.plot(steps, values, single, color=BLUE, linewidth=1.6, label=label)
    if from_zero:
        panel.set_ylim(bottom=0)


def _series(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    pairs = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _truncate(path: pathlib.Path, last_step: int) -> None:
    """Keeps the objects up to `last_step`, atomically: the file is the old one or the new one, never half of either."""
    if not path.exists():
        return
    kept = [record for record in _parse(path) if record["step"] <= last_step]
    part = path.with_name(f"{FILE}.part")
    part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(part, path)


def _parse(path: pathlib.Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    # Every object ends in a newline, so the piece behind the last one is empty or was cut short by a crash.
    records, faults = [], []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            faults.append(f"{path}:{number}: not JSON: {error.msg}")
    if faults:
        raise ValueError("the metrics cannot be read:\n  " + "\n  ".join(faults))
    return records


def _plain(value: Any) -> int | float | str | None:
    """A Python number (strings stay): arrays of one element and NumPy scalars are what a step returns."""
    if isinstance(value, str) or value is None:
        return value
    number = value.item() if hasattr(value, "item") else value
    return number if not isinstance(number, float) or math.isfinite(number) else None
