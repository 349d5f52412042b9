"""How adapters that were trained side by side have done, best first."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jlora.train import many
from jlora.train.config import RunConfig
from jlora.train.reporting.metrics import read_metrics

SHARE = 10  # the training loss is the mean over the last one in so many of the logged steps


@dataclasses.dataclass(frozen=True)
class Standing:
    """One adapter of a run.

    Attributes:
        own: its own settings, by dotted name.
        loss: of the run's last steps; NaN if one of them is not finite or none is logged.
        eval_loss: the last one; NaN if it is not finite, None if the run does not evaluate.
    """

    name: str
    own: Mapping[str, Any]
    loss: float
    eval_loss: float | None

    @property
    def measure(self) -> float:
        """What adapters are ranked by, smallest first: the evaluation's loss, if there is one."""
        return self.loss if self.eval_loss is None else self.eval_loss


def standings(config: RunConfig, workdir: str | os.PathLike) -> list[Standing]:
    """The adapters of a run; best first if they have the same data, and otherwise by name."""
    records = read_metrics(workdir)
    found = []
    for name, groups in sorted(config.adapters.items()):
        own = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
        losses = _numbers(records, f"loss/{name}")
        evaluated = _numbers(records, f"eval_loss/{name}")
        last = losses[-max(1, len(losses) // SHARE) :]
        loss = float(np.mean(last)) if last else float("nan")
        found.append(Standing(name, own, loss, evaluated[-1] if evaluated else None))
    return sorted(found, key=_rank) if comparable(config) else found


def comparable(config: RunConfig) -> bool:
    """Whether the adapters have the same data, so that their losses say which is better."""
    first, *others = (member.data for member in config.members().values())
    return all(other == first for other in others)


def show(config: RunConfig, workdir: str | os.PathLike, console: Console | None = None) -> None:
    """Prints a table of the adapters and, if they can be compared, which folder holds the best."""
    console = console or Console(highlight=False, soft_wrap=True)
    found = standings(config, workdir)
    console.print(_table(found))
    if comparable(config) and np.isfinite(found[0].measure):
        by = "training loss (data.eval_path and train.eval_every=N would rank them on records of their own)"
        by = by if found[0].eval_loss is None else "loss of the evaluation"
        console.print(f"best by {by}: {pathlib.Path(workdir) / many.FOLDER / found[0].name}", markup=False)


def _table(found: list[Standing]) -> Table:
    settings = list(dict.fromkeys(name for one in found for name in one.own))
    evaluated = any(one.eval_loss is not None for one in found)
    table = Table()
    for name in settings:
        table.add_column(name, no_wrap=True)
    for name in ["loss", *(["eval loss"] if evaluated else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"in {many.FOLDER}/", overflow="fold")
    for one in found:
        numbers = [_number(one.loss), *([_number(one.eval_loss)] if evaluated else [])]
        own = [str(one.own[name]) if name in one.own else "" for name in settings]
        table.add_row(*map(Text, [*own, *numbers, one.name]))
    return table


def _rank(one: Standing) -> tuple[bool, float]:
    return not np.isfinite(one.measure), one.measure


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if np.isfinite(value) else "not finite"


def _numbers(records: list[dict[str, Any]], key: str) -> list[float]:
    """The values of a key; NaN where the log has null."""
    return [float("nan") if record[key] is None else float(record[key]) for record in records if key in record]
