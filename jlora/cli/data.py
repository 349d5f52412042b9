"""`jlora data`: what a run trains on, token by token, before anything is trained."""

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jlora import hub
from jlora.cli.overrides import read_run
from jlora.data import LeftOut, Notes, shown
from jlora.errors import UserError, number_of
from jlora.train.algorithms import ALGORITHMS
from jlora.train.algorithms.algorithm import Encoded, Plan
from jlora.train.config import RunConfig
from jlora.train.prepared import run_tokenizer

SIDES = {1: ("",), 2: ("chosen", "rejected")}
ROWS = 8  # of packed rows that are shown


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0."""
    config = read_run(options.config, options.overrides)
    described = hub.read_model(config.model.path, config.model.resize_vocab).config
    tokenizer = run_tokenizer(config, described.vocab_size, datetime.datetime.now())
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    told = Console(stderr=True, highlight=False, soft_wrap=True)
    found = {}
    for name, one in (config.members() if config.adapters else {"": config}).items():
        left_out, said = LeftOut(), told if options.json else console
        notes = Notes(lambda message, said=said: said.print(message, markup=False), said.print, left_out)
        plan = ALGORITHMS[one.algorithm].plan(one, tokenizer, notes.about(name) if name else notes)
        if options.json:
            found[name] = _numbers(plan, left_out)
        else:
            _show(console, _View(one, plan.encoded, tokenizer, left_out, options.show), name)
    if options.json:
        print(json.dumps(found if config.adapters else found[""], indent=2, ensure_ascii=False))
    return 0


class _View:
    """What is shown of a run's data."""

    def __init__(
        self, config: RunConfig, encoded: Encoded | None, tokenizer: Any, left_out: LeftOut, show: int
    ) -> None:
        if encoded is None:
            raise UserError(
                f"data.path is {config.data.path!r}: a task makes its prompts as the run starts: nothing to show"
            )
        self.config, self.tokenizer, self.left_out, self.show = config, tokenizer, left_out, show
        self.items, self.report, self.steps = encoded.items, encoded.report, encoded.steps


def _show(console: Console, view: _View, name: str) -> None:
    if name:
        console.rule(name)
    for part in (_counts, _lengths, _left_out, _examples, _rows):
        for line in part(view, console):
            console.print(line)


def _counts(view: _View, console: Console) -> Iterator[Any]:
    report = view.report
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_row("examples", f"{report.examples:,}")
    table.add_row("tokens", f"{report.tokens:,}")
    if report.trained_tokens:
        table.add_row("trained tokens", f"{report.trained_tokens:,} ({report.trained_tokens / report.tokens:.1%})")
    if view.steps:
        rows = sum(len(step.rows) for step in view.steps)
        table.add_row("steps", f"{len(view.steps):,} of {rows / len(view.steps):g} rows")
        table.add_row("padding", f"{shown.padding(view.steps, view.items):.1%} of all tokens that are computed")
    if report.cut:
        table.add_row("cut", f"{report.cut:,} at train.seq_len={view.config.train.seq_len}")
    yield Text("")
    yield table
    yield from report.notes


def _lengths(view: _View, console: Console) -> Iterator[Any]:
    yield Text("\nlengths in tokens", "bold")
    yield shown.drawn(view.items.examples.lengths)


def _left_out(view: _View, console: Console) -> Iterator[Any]:
    if not view.left_out:
        return
    yield Text("\nleft out", "bold")
    for reason in view.left_out.reasons:
        places = ", ".join(reason.places) + (", …" if reason.count > len(reason.places) else "")
        yield Text(f"{reason.count:>8,}  {reason.text}  ({places})")


def _examples(view: _View, console: Console) -> Iterator[Any]:
    colours = console.is_terminal and not console.no_color
    if view.show:
        yield Text(f"\n{shown.LEGEND if colours else shown.PLAIN_LEGEND}", "italic")
    for number in range(min(view.show, len(view.items))):
        item = view.items[number]
        for side, document in zip(SIDES.get(len(item.documents), ("",) * 9), item.documents, strict=False):
            trained = f", {int(document.trained.sum()):,} trained" if view.report.trained_tokens else ""
            values = "".join(f", {key} {value:g}" for key, value in item.values.items())
            head = f"\nexample {number + 1} {side}".rstrip()
            yield Text(f"{head}: {number_of(len(document.tokens), 'token')}{trained}{values}", "bold")
            yield shown.marked(document, view.tokenizer, colours=colours)


def _rows(view: _View, console: Console) -> Iterator[Any]:
    if view.show and view.steps:
        yield Text("\nrows of the first step (a block for each document, full where it is trained)", "bold")
        yield from list(shown.pictured(view.steps[0], view.items.examples))[:ROWS]


def _numbers(plan: Plan, left_out: LeftOut) -> Mapping[str, Any]:
    """What is shown, as JSON."""
    reasons = [{"reason": one.text, "count": one.count, "places": list(one.places)} for one in left_out.reasons]
    if plan.encoded is None:
        return {"left_out": reasons, "steps": plan.total_steps}
    report, lengths = plan.encoded.report, plan.encoded.items.examples.lengths
    return {
        "examples": report.examples,
        "tokens": report.tokens,
        "trained_tokens": report.trained_tokens,
        "examples_of_sources": list(report.sources),
        "cut": report.cut,
        "steps": plan.total_steps,
        "lengths": _quantiles(lengths),
        "histogram": [{"least": least, "most": most, "count": n} for least, most, n in shown.histogram(lengths)],
        "padding": shown.padding(plan.encoded.steps, plan.encoded.items) if plan.encoded.steps else None,
        "left_out": reasons,
        "notes": list(report.notes),
    }


def _quantiles(lengths: np.ndarray) -> dict[str, float]:
    names = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: float(np.quantile(lengths, share)) for name, share in names.items()} | {
        "mean": float(np.mean(lengths))
    }
