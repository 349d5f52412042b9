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
from jlora.train.evaluate import evaluate, load_metric


def run(arguments: list[str]) -> int:
    """0; what is wrong is raised."""
    options = _parser().parse_args(arguments)
    # What can be wrong without the model is found before the model is loaded.
    metric = load_metric(options.metric) if options.metric else None
    records = data.read_records(options.data)
    model, params, tokenizer = load_model(options)
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
    if options.json:
        print(json.dumps({name: value if math.isfinite(value) else None for name, value in numbers.items()}))
    else:
        _print_table(numbers, title=options.model + (f" + {options.adapter}" if options.adapter else ""))
    return 0


def _print_table(numbers: Mapping[str, float], title: str) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.0f}" if name in ("n", "tokens") else f"{value:.4f}")
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
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    return parser
