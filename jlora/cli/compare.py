"""`jlora compare`: several runs in one table and one plot."""

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from jlora.cli.parsers.compare import PLOT
from jlora.errors import MissingFileError, UserError, size_of
from jlora.train.reporting.compare import Comparison, compare, draw
from jlora.train.reporting.metrics import can_plot
from jlora.types import require


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0; mistakes raise."""
    if options.out:
        require("matplotlib.figure", "plots")
        path = pathlib.Path(options.out)
        if path.is_dir() or path.suffix.lower() != ".png":
            raise UserError(f"--out={path}: expected a file FILE.png")
        if not path.absolute().parent.is_dir():
            raise MissingFileError(f"--out={path}: found no folder {path.parent}")
    found = compare(options.runs)
    if options.json:
        print(json.dumps({"runs": found.rows(), "remarks": found.remarks}))
    else:
        _show(found)
    if options.out or (not options.json and can_plot()):
        path = pathlib.Path(options.out or PLOT)
        draw(path, found.runs)
        if not options.json:
            print(f"plot: {path}")
    return 0


def _show(found: Comparison) -> None:
    rows = found.rows()
    numbers = dict.fromkeys(name for row in rows for name in row if name not in ("name", "workdir", "settings"))
    numbers.pop("finished")
    lines = [["", *found.differing, *(HEADS.get(name, name.replace("_", " ")) for name in numbers)]]
    for row in rows:
        settings = (_setting(row["settings"][name]) for name in found.differing)
        values = (_cell(name, row.get(name)) for name in numbers)
        lines.append([row["name"] + ("" if row["finished"] else " *"), *settings, *values])
    if len(lines) < len(lines[0]):  # the longer side goes down
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = Table()
    for number, head in enumerate(lines[0]):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*line)
    Console().print(table)
    for remark in found.remarks:
        print(remark)


HEADS = {"peak_bytes": "peak memory", "trainable_parameters": "trained", "tokens_per_second": "tokens/s"}
FORMS: Mapping[str, Callable[[Any], str]] = {
    "steps": "{:,}".format,
    "tokens": "{:,}".format,
    "trainable_parameters": "{:,}".format,
    "tokens_per_second": "{:,.0f}".format,
    "peak_bytes": size_of,
    "best": lambda best: f"{best['metric'].removeprefix('eval_')} {best['value']:.4g} at {best['step']:,}",
}


def _cell(name: str, value: Any) -> str:
    return "" if value is None else FORMS.get(name, "{:.4g}".format)(value)


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
