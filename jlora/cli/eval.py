"""`jlora eval`: measures a model on a JSONL file, and prints a table or JSON."""

import argparse
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from jlora import data, lora
from jlora.cli.model import load_model, load_settings, open_model, print_note
from jlora.errors import MissingFileError, UserError, raise_all
from jlora.models import Model
from jlora.train.algorithms import reward_model
from jlora.train.evaluation import forgetting, metrics
from jlora.train.evaluation.records import ANSWER, NUMBERS, evaluate
from jlora.types import Params, require


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0; mistakes and failures raise."""
    # Whatever can be checked without the model is checked before it is loaded.
    metric = metrics.load(options.metric) if options.metric else None
    records = _read(options)
    keys = {key for record in records for key in record}
    raise_all(f"--metric: {fault}" for fault in (metric.faults(keys) if metric else ()))
    sets = _sets(options) if options.against or options.scales else {}
    model, params, tokenizer = load_model(options)
    if not options.pairs:
        records = data.encodable(records, tokenizer, on_error=options.on_error, note=print_note)
    if ("score" in params) != options.pairs:
        found = "a reward model" if "score" in params else "not a reward model: it has no score head"
        raise UserError(f"{options.adapter or options.model} is {found}; --pairs is for reward models, which need it")
    if options.pairs:
        _compare(options, model, params, tokenizer, records)
        return 0

    def measure(model: Model, params: Params) -> tuple[dict[str, float], list[dict[str, Any]]]:
        found = evaluate(
            model,
            params,
            tokenizer,
            records,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            generate_texts=not options.loss_only,
        )
        return metrics.scored(metric, records, *found) if metric else found

    if options.against or options.scales:
        (_against if options.against else _sweep)(options, _Measured(model, params, tokenizer, records, sets, measure))
        return 0
    try:
        numbers, answers = measure(model, params)
    except metrics.MetricFailed as error:
        _report(options, error.numbers, error.answers)
        raise
    _report(options, numbers, answers)
    return 0


def _report(options: argparse.Namespace, numbers: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None:
    _show(options, numbers)
    if options.answers:
        _write_answers(pathlib.Path(options.answers), answers)


def _read(options: argparse.Namespace) -> list[dict[str, Any]]:
    given = {
        "--metric": options.metric,
        "--answers": options.answers,
        "--loss_only": options.loss_only,
    }
    for mode, texts in (("--pairs", given), ("--loss_only", ("--metric", "--answers"))):
        idle = [name for name in texts if given[name]] if getattr(options, mode[2:]) else []
        if idle:
            raise UserError(f"{', '.join(idle)} has no effect with {mode}")
    if options.metric == metrics.EXACT_MATCH:
        raise UserError(f"--metric={options.metric} is measured without the option: leave it out")
    if options.plot and not (options.pairs or options.scales):
        raise UserError("--plot has no effect without --pairs or --scales")
    if sum(map(bool, (options.pairs, options.against, options.scales))) > 1:
        raise UserError("--pairs, --against and --scales cannot be combined: give one of them")
    if (options.against == "base" or options.scales) and not options.adapter:
        raise UserError(
            f"--{'scales' if options.scales else 'against=base'} needs --adapter: without it there is no base"
        )
    if (options.general or options.questions) and not (options.against or options.scales):
        raise UserError("--general and --questions have no effect without --against or --scales")
    if options.answers and (options.against or options.scales):
        raise UserError("--answers has no effect with --against or --scales")
    for name, path in (("--plot", options.plot), ("--answers", options.answers)):
        if path and not pathlib.Path(path).parent.is_dir():
            raise MissingFileError(f"{name}={path}: found no folder {pathlib.Path(path).parent}")
        if path and pathlib.Path(path).is_dir():
            raise UserError(f"{name}={path}: found a folder, expected a file")
    if options.plot:
        require("matplotlib.figure", "plots")
    settings = {"on_error": options.on_error, "note": print_note}
    if options.pairs:
        return data.read_preferences(options.data, "pairs", **settings)
    return data.read_records(options.data, **settings)


def _compare(
    options: argparse.Namespace, model: Model, params: Params, tokenizer: Any, records: list[dict[str, Any]]
) -> None:
    """Shows a reward model's figures on pairs, and draws its calibration if a plot is asked for."""
    items, report = data.encode_preferences(
        records, tokenizer, seq_len=options.seq_len, on_error=options.on_error, note=print_note
    )
    metrics = reward_model.compare(model, params, items, batch_size=options.batch_size, seq_len=options.seq_len)
    _show(options, reward_model.report(metrics) | {"n": float(len(items)), "dropped": float(report.dropped)})
    if options.plot:
        reward_model.draw_calibration(pathlib.Path(options.plot), metrics)


class _Measured(NamedTuple):
    """A model with the task's records, what else is measured, and what measures it on the task."""

    model: Model
    params: Params
    tokenizer: Any
    records: list[dict[str, Any]]
    sets: dict[str, Any]
    measure: Callable[[Model, Params], tuple[dict[str, float], list[dict[str, Any]]]]


def _sets(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured besides the task."""
    settings = {"on_error": options.on_error, "note": print_note}
    return {
        "general": data.read_records(options.general or str(forgetting.GENERAL), **settings),
        "questions": forgetting.read_questions(options.questions or forgetting.QUESTIONS, **settings),
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
    }


def _changes(options: argparse.Namespace, given: _Measured) -> list[forgetting.Change]:
    """The model compared with its base or with another model."""
    model, params, tokenizer, records, sets, measure = given
    other, before = model, lora.strip(params)
    if options.against != "base":
        other, before = open_model(options.against, quiet=options.json, **load_settings(options))
        other.config.require_same(model.config, options.against, options.model)
    changes = forgetting.compare(model, before, params, tokenizer, task=records, **sets)
    if options.loss_only:
        return changes
    # Each model's texts stop at its own end tokens.
    found = [measure(*one)[1] for one in ((other, before), (model, params))]
    scores = ([{k: v for k, v in answer.items() if k not in ANSWER} for answer in answers] for answers in found)
    return changes + forgetting.compare_scores(*scores)


def _against(options: argparse.Namespace, given: _Measured) -> None:
    """Shows the table of changes."""
    changes = _changes(options, given)
    if options.json:
        print(json.dumps(_finite({change.measure: change._asdict() for change in changes})))
        return
    table = Table("measure", "before", "after", "change", "95 % interval", "", "n")
    for change in changes:
        interval = f"{change.low:+.4f} to {change.high:+.4f}" if math.isfinite(change.low) else ""
        values = (f"{change.before:.4f}", f"{change.after:.4f}", f"{change.after - change.before:+.4f}")
        count = f"{change.n} of {change.n + change.dropped}" if change.dropped else f"{change.n}"
        table.add_row(change.measure, *values, interval, _doubt(change), count)
    table.title = f"{options.model} + {options.adapter or 'nothing'} against {options.against}"
    Console().print(table)


def _doubt(change: forgetting.Change) -> str:
    """Why a change may not be real; "" for a clear one."""
    if not math.isfinite(change.after - change.before):
        return "not finite"
    return "" if change.is_clear else "one record" if change.n == 1 else "within chance"


def _sweep(options: argparse.Namespace, given: _Measured) -> None:
    """Shows the table of a sweep, and draws it if a plot is asked for."""
    model, params, tokenizer, records, sets, measure = given

    def scores(params: Params) -> dict[str, float]:
        numbers = {} if options.loss_only else measure(model, params)[0]
        return {name: value for name, value in numbers.items() if name not in NUMBERS}

    rows = forgetting.sweep(model, params, tokenizer, options.scales, task=records, measure=scores, **sets)
    if options.json:
        print(json.dumps(_finite(rows)))
    else:
        names = dict.fromkeys(name for row in rows for name in row)
        table = Table(*names)
        for row in rows:
            table.add_row(*(f"{row[name]:.4g}" if name in row else "" for name in names))
        Console().print(table)
    if options.plot:
        forgetting.draw_sweep(pathlib.Path(options.plot), rows)


def _show(options: argparse.Namespace, numbers: Mapping[str, float]) -> None:
    if options.json:
        print(json.dumps(_finite(numbers)))
    else:
        _print_table(numbers, title=options.model + (f" + {options.adapter}" if options.adapter else ""))


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(numbers: Mapping[str, float], title: str) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.0f}" if name in ("n", "tokens", "dropped") else f"{value:.4f}")
    Console().print(table)


def _write_answers(path: pathlib.Path, answers: Sequence[Mapping[str, Any]]) -> None:
    part = path.with_name(f"{path.name}.part")
    lines = (json.dumps(_finite(answer), ensure_ascii=False) + "\n" for answer in answers)
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, path)
