"""`jlora eval`: numbers about a model on a JSONL file, as a table or as JSON."""

import argparse
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jlora import data
from jlora.cli.model import add_model_options, load_model, positive
from jlora.models import Model
from jlora.train import reward_model
from jlora.train.evaluate import evaluate, load_metric
from jlora.types import Params


def run(arguments: list[str]) -> int:
    """0; what is wrong is raised."""
    options = _parser().parse_args(arguments)
    # What can be wrong without the model is found before the model is loaded.
    metric = load_metric(options.metric) if options.metric else None
    records = _read(options)
    model, params, tokenizer = load_model(options)
    if ("score" in params) != options.pairs:
        found = "a reward model" if "score" in params else "no reward model: it has no score head"
        raise ValueError(
            f"{options.adapter or options.model} is {found}; --pairs is for reward models, and only for them"
        )
    if options.pairs:
        _show(options, _compare(options, model, params, tokenizer, records))
        return 0
    numbers, answers = evaluate(
        model,
        params,
        tokenizer,
        records,
        metric=metric,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        generate_texts=not options.loss_only,
    )
    if options.answers:
        _write_answers(pathlib.Path(options.answers), answers)
    _show(options, numbers)
    return 0


def _read(options: argparse.Namespace) -> list[dict[str, Any]]:
    given = {
        "--metric": options.metric,
        "--answers": options.answers,
        "--loss_only": options.loss_only,
    }
    idle = [name for name, value in given.items() if value] if options.pairs else []
    idle += ["--plot"] if options.plot and not options.pairs else []
    if idle:
        raise ValueError(f"{', '.join(idle)} has no effect {'with' if options.pairs else 'without'} --pairs")
    return data.read_preferences(options.data, "pairs") if options.pairs else data.read_records(options.data)


def _compare(
    options: argparse.Namespace, model: Model, params: Params, tokenizer: Any, records: list[dict[str, Any]]
) -> dict[str, float]:
    """What a reward model makes of pairs; the plot where one is asked for."""
    items, report = data.encode_pairs(records, tokenizer, seq_len=options.seq_len)
    metrics = reward_model.compare(model, params, items, batch_size=options.batch_size, seq_len=options.seq_len)
    if options.plot:
        reward_model.draw_calibration(pathlib.Path(options.plot), metrics)
    return reward_model.report(metrics) | {"n": float(len(items)), "dropped": float(report.dropped)}


def _show(options: argparse.Namespace, numbers: Mapping[str, float]) -> None:
    if options.json:
        print(json.dumps({name: value if math.isfinite(value) else None for name, value in numbers.items()}))
    else:
        _print_table(numbers, title=options.model + (f" + {options.adapter}" if options.adapter else ""))


def _print_table(numbers: Mapping[str, float], title: str) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.0f}" if name in ("n", "tokens", "dropped") else f"{value:.4f}")
    Console().print(table)


def _write_answers(path: pathlib.Path, answers: Sequence[Mapping[str, Any]]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8")
    os.replace(part, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jlora eval",
        description="Loss and perplexity on the completions of a JSONL file, and the texts that the model gives.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    parser.add_argument("--data", required=True, metavar="FILE.jsonl", help="records as for training")
    parser.add_argument("--metric", metavar="FILE.py", help="a file with metric(record, text) → numbers by name")
    parser.add_argument("--max_new_tokens", type=positive, default=128, metavar="N", help="of a text (default: 128)")
    parser.add_argument("--batch_size", type=positive, default=8, metavar="N", help="records at a time (default: 8)")
    parser.add_argument("--seq_len", type=positive, default=512, metavar="N", help="tokens that the loss looks at")
    parser.add_argument("--loss_only", action="store_true", help="generate no texts")
    parser.add_argument("--answers", metavar="FILE.jsonl", help="write prompts, targets and texts there")
    parser.add_argument("--pairs", action="store_true", help="of a reward model: accuracy on prompt, chosen, rejected")
    parser.add_argument("--plot", metavar="FILE.png", help="with --pairs: draw how far its probabilities hold")
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    return parser
