"""How adapters that were trained side by side have done, best first."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jlora.train import best, many
from jlora.train.config import RunConfig
from jlora.train.reporting.metrics import read_metrics

SHARE = 10  # the training loss is the mean over the last one in so many of the logged steps
LOSS = "eval_loss"


@dataclasses.dataclass(frozen=True)
class Standing:
    """One adapter of a run, at the step that its folder has it from.

    Attributes:
        own: its own settings, by dotted name.
        loss: of the last steps in training; NaN if one of them is not finite or none is logged.
        evaluated: the evaluation's numbers that the table shows, by name; NaN where not finite.
    """

    name: str
    own: Mapping[str, Any]
    loss: float
    evaluated: Mapping[str, float]

    def value(self, by: str) -> float:
        """The number of this name; NaN if it was not measured."""
        return self.loss if by == "loss" else self.evaluated.get(by, math.nan)


def standings(config: RunConfig, workdir: str | os.PathLike) -> tuple[list[Standing], str]:
    """The adapters of a run, and the number that ranks them: `train.best_metric`, the evaluation's loss, or the loss.

    The best is first if they have the same data; otherwise they are in the order of their names.
    """
    records, wanted = _records(config, pathlib.Path(workdir)), best.Best(config.train)
    shown = [key for key in dict.fromkeys((LOSS, wanted.metric)) if key]
    found = []
    for name, groups in sorted(config.adapters.items()):
        own = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
        losses = _numbers(records, f"loss/{name}")
        last = losses[-max(1, len(losses) // SHARE) :]
        evaluated = {key: values[-1] for key in shown if (values := _numbers(records, f"{key}/{name}"))}
        found.append(Standing(name, own, float(np.mean(last)) if last else math.nan, evaluated))
    by = next((key for key in (wanted.metric, LOSS) if key and any(key in one.evaluated for one in found)), "loss")
    sign = wanted.sign if by == wanted.metric else -1

    def rank(one: Standing) -> tuple[bool, float]:
        return not math.isfinite(one.value(by)), -sign * one.value(by)

    return sorted(found, key=rank) if comparable(config) else found, by


def comparable(config: RunConfig) -> bool:
    """Whether the adapters have the same data, so that their numbers say which is better."""
    first, *others = (member.data for member in config.members().values())
    return all(other == first for other in others)


def show(config: RunConfig, workdir: str | os.PathLike, console: Console | None = None) -> None:
    """Prints a table of the adapters and, if they can be compared, which folder holds the best."""
    console = console or Console(highlight=False, soft_wrap=True)
    found, by = standings(config, workdir)
    console.print(_table(found))
    if comparable(config) and math.isfinite(found[0].value(by)):
        hint = " of training; with data.eval_path and train.eval_every=N, of records that are not trained on"
        text = f"{by.replace('_', ' ')}{hint if by == 'loss' else ''}"
        console.print(f"best by {text}: {pathlib.Path(workdir) / many.FOLDER / found[0].name}", markup=False)


def _table(found: list[Standing]) -> Table:
    settings = list(dict.fromkeys(name for one in found for name in one.own))
    numbers = list(dict.fromkeys(key for one in found for key in one.evaluated))
    table = Table()
    for name in settings:
        table.add_column(name, no_wrap=True)
    for name in ("loss", *numbers):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    table.add_column(f"in {many.FOLDER}/", overflow="fold")
    for one in found:
        own = [str(one.own[name]) if name in one.own else "" for name in settings]
        values = [_number(value) for value in (one.loss, *map(one.evaluated.get, numbers))]
        table.add_row(*map(Text, [*own, *values, one.name]))
    return table


def _records(config: RunConfig, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The log up to the step that the run's adapters are from."""
    records, path = read_metrics(workdir), workdir / best.FILE
    if not (config.train.best_metric and config.train.load_best and path.exists()):
        return records
    step = json.loads(path.read_text())["step"]
    return [record for record in records if record["step"] <= step]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _numbers(records: list[dict[str, Any]], key: str) -> list[float]:
    """The values of a key; NaN where the log has null."""
    return [math.nan if record[key] is None else float(record[key]) for record in records if key in record]
