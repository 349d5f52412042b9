#!/usr/bin/env python3
"""What does full fine-tuning learn, cost and forget, beside LoRA and QLoRA? The quickstart's task, three times.

    python benchmarks/full_vs_lora.py [--steps=48] [--questions=40] [--only NAME …] [--config.GROUP.KEY=VALUE …]

Forty minutes on two CPU cores. Each run is a process of its own, so that its peak memory
is its own (on CPUs the process's, model and compiler included). Then the trained models answer the test questions, and
are compared with the untouched base on general text and on multiple-choice questions. The table is printed, and saved
as JSON in benchmarks/results/ after each run; `--only` keeps the other runs' figures there.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import record
import rich.console
import rich.table

import jlora
from jlora import data, lora, tree
from jlora.train.evaluation import forgetting, metrics
from jlora.train.evaluation.records import evaluate
from jlora.train.reporting.metrics import read_metrics
from jlora.train.restore import load_run

NAME = "full_vs_lora"
ROOT = pathlib.Path(__file__).resolve().parents[1]
TASK = ROOT / "scripts" / "function_calling.py"
# What differs from configs/quickstart.py. Full fine-tuning gets a tenth of LoRA's learning rate.
RUNS = {
    "full": ["--config.lora=None", "--config.model.quant=None", "--config.optim.learning_rate=1e-4"],
    "LoRA": ["--config.model.quant=None"],
    "QLoRA (NF4)": [],
}
MAX_NEW_TOKENS, BATCH_SIZE = 80, 20

Numbers = dict[str, Any]


def main() -> None:
    """Trains and measures each run, prints and writes the table."""
    options, overrides = _parse()
    console, work = rich.console.Console(), options.work.expanduser()
    source, folder = options.model, options.data
    if not source:
        folder = work / "data"
        subprocess.run([sys.executable, TASK, "prepare", f"--out={folder}", f"--cache={options.cache}"], check=True)
        source = next(options.cache.expanduser().rglob("*.gguf"))
    test = data.read_records(folder / "test.jsonl")
    count = min(options.questions, len(test))
    test = [test[i * len(test) // count] for i in range(count)]  # evenly: they are sorted by kind
    overrides = [f"--config.train.steps={options.steps}", *overrides]
    about = {"steps": options.steps, "overrides": overrides[1:], "questions": count}
    rows = _kept(about) if options.only else {}
    model, base = jlora.load(source, dtype="float32")
    tokenizer = jlora.load_tokenizer(source)
    with console.status(f"the base answers {count} questions"):
        rows["before"] = _answers(model, base, tokenizer, test)
    for name in options.only or RUNS:
        workdir = work / f"{name.split()[0].lower()}-{time.strftime('%Y%m%d-%H%M%S')}"
        console.print(f"{name}: {options.steps} steps in {workdir}", highlight=False)
        trained = _train(source, folder / "train.jsonl", workdir, [*RUNS[name], *overrides])
        config, model, params = load_run(workdir)
        trained["trained_parameters"] = tree.count(lora.split(params, config.trains)[1])
        with console.status(f"{name} answers {count} questions, and what it has forgotten is measured"):
            rows[name] = trained | _answers(model, params, tokenizer, test) | _forgotten(model, base, params, tokenizer)
        del params
        rows = {name: rows[name] for name in ("before", *RUNS) if name in rows}
        written = record.save(NAME, about | {"rows": rows})
    console.print(_table(rows))
    console.print(f"written: {written}")


def _kept(about: Numbers) -> dict[str, Numbers]:
    """The rows of an earlier run of the same size."""
    path = record.RESULTS / f"{NAME}.json"
    earlier = json.loads(path.read_text())["figures"] if path.exists() else {}
    return earlier["rows"] if about.items() <= earlier.items() else {}


def _train(source: pathlib.Path, train: pathlib.Path, workdir: pathlib.Path, settings: list[str]) -> Numbers:
    """Seconds and peak memory of a run on the command line, and its losses."""
    paths = [f"--config.model.path={source}", f"--config.data.path={train}"]
    recipe = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    command = [sys.executable, "-m", "jlora", "train", recipe, f"--workdir={workdir}", *paths, *settings]
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT)
    seconds = time.perf_counter() - began
    used = json.loads((workdir / "usage.json").read_text())
    return {
        "seconds": seconds,
        "tokens_per_second": used["tokens_per_second"],
        "peak_bytes": used["peak_bytes"],
        "last_loss": read_metrics(workdir)[-1]["loss"],
    }


def _answers(model: Any, params: Any, tokenizer: Any, test: list[data.Record]) -> Numbers:
    """Loss and scores on the test questions."""
    settings = dict(max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE)
    found = evaluate(model, params, tokenizer, test, **settings)
    numbers, _ = metrics.scored(metrics.load(str(TASK)), test, *found)
    return {name: numbers[name] for name in ("loss", "valid_json", "correct")}


def _forgotten(model: Any, before: Any, after: Any, tokenizer: Any) -> Numbers:
    """The changes of general text's loss and of right answers to questions, with their 95 % intervals."""
    general = data.read_records(str(forgetting.GENERAL))
    questions = forgetting.read_questions(forgetting.QUESTIONS)
    found = forgetting.compare(model, before, after, tokenizer, general=general, questions=questions)
    return {change.measure: change._asdict() for change in found}


def _table(rows: dict[str, Numbers]) -> rich.table.Table:
    table = rich.table.Table("", *rows)
    for column in table.columns[1:]:
        column.justify = "right"

    def change(found: Numbers | None) -> str:
        if found is None:
            return ""
        return f"{found['after'] - found['before']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"

    forms = {
        "trained_parameters": ("trained parameters", "{:,}".format),
        "peak_bytes": ("peak memory, GiB", lambda size: f"{size / 2**30:.2f}"),
        "seconds": ("seconds, from start to files", "{:.0f}".format),
        "tokens_per_second": ("tokens a second", "{:,.0f}".format),
        "loss": ("loss on the answers", "{:.3f}".format),
        "valid_json": ("answers that are one JSON call", "{:.0%}".format),
        "correct": ("answers that are an accepted call", "{:.0%}".format),
        "general loss": ("general text, loss", change),
        "questions right": ("multiple choice, share right", change),
    }
    for key, (title, form) in forms.items():
        table.add_row(title, *(form(row[key]) if row.get(key) is not None else "" for row in rows.values()))
    return table


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=40, help="test questions, of 100 (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / NAME, help="default: %(default)s")
    parser.add_argument(
        "--cache", type=pathlib.Path, default=pathlib.Path("~/.cache/jlora"), help="downloads (default: %(default)s)"
    )
    parser.add_argument("--model", type=pathlib.Path, help="another model than SmolLM2-135M-Instruct; with --data")
    parser.add_argument("--data", type=pathlib.Path, help="its folder of train.jsonl and test.jsonl")
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
