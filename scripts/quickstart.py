#!/usr/bin/env python3
"""The quickstart: fetch a small model and a real task, measure, train, measure again, and show what changed.

scripts/quickstart.sh installs the requirements and starts it. `--config.GROUP.KEY=VALUE` changes configs/quickstart.py.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is not needed

import function_calling
from rich.console import Console
from rich.table import Table

import jlora
from jlora import allocator
from jlora.cli.overrides import read_config
from jlora.data import read_records
from jlora.train import loop
from jlora.train.config import resolve
from jlora.train.evaluation.metrics import load, scored
from jlora.train.evaluation.records import evaluate
from jlora.train.reporting.progress import Progress

ROOT = pathlib.Path(__file__).resolve().parent.parent
MEASURES = {
    "loss": "loss on the answers",
    "valid_json": "answers that are one JSON call",
    "correct": "answers that are an accepted call",
}


def main(argv: list[str] | None = None) -> None:
    """Runs everything, from the download to the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", default=os.path.relpath(ROOT / "runs" / "quickstart"), help="default: %(default)s")
    parser.add_argument("--cache", default=function_calling.CACHE, help="folder for downloads (default: %(default)s)")
    parser.add_argument(
        "--questions", type=int, default=40, help="test questions to measure with, of 100 (default: %(default)s)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=80, help="of an answer (default: %(default)s)")
    options, overrides = parser.parse_known_args(argv)
    allocator.keep_freed_pages()
    console = Console(highlight=False, soft_wrap=True)
    workdir = pathlib.Path(options.workdir)

    gguf = function_calling.prepare(workdir / "data", pathlib.Path(options.cache).expanduser())
    paths = [f"--config.model.path={gguf}", f"--config.data.path={workdir / 'data' / 'train.jsonl'}"]
    config = resolve(read_config(str(ROOT / "configs" / "quickstart.py"), [*paths, *overrides]))

    questions = read_records(str(workdir / "data" / "test.jsonl"))
    count = min(options.questions, len(questions))
    questions = [questions[i * len(questions) // count] for i in range(count)]  # evenly: they are sorted by kind
    model, params = jlora.load(gguf, dtype=config.model.dtype, quant=config.model.quant)
    tokenizer = jlora.load_tokenizer(gguf)
    metric = load(str(ROOT / "scripts" / "function_calling.py"))

    def measure(params: dict, when: str) -> tuple[dict, list]:
        started = time.monotonic()
        console.print(f"Measuring on {len(questions)} test questions, {when} training")
        settings = dict(max_new_tokens=options.max_new_tokens, batch_size=20)
        result = scored(metric, questions, *evaluate(model, params, tokenizer, questions, **settings))
        console.print(f"  took {time.monotonic() - started:.0f} s")
        return result

    before, _ = measure(params, "before")
    console.print("Training (curves and numbers go to the workdir)")
    with Progress(sys.stderr) as progress:
        loop.run(config, str(workdir), progress=progress)
    adapter = workdir / "adapter"
    after, answers = measure(jlora.load_adapter(params, adapter), "after")

    console.print(_table(before, after))
    _show_answers(console, questions, answers)
    console.print(
        f"adapter  {adapter}\ncurves   {workdir / 'curves.png'}\n\nThe adapter in PEFT (pip install torch peft):\n"
    )
    console.print(_peft_lines(gguf, adapter), markup=False)


def _table(before: dict, after: dict) -> Table:
    table = Table("test questions", "before", "after")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, text in MEASURES.items():
        form = "{:.3f}" if name == "loss" else "{:.0%}"
        table.add_row(text, form.format(before[name]), form.format(after[name]))
    return table


def _show_answers(console: Console, questions: list[dict], answers: list[dict], count: int = 3) -> None:
    """Prints the first few questions with the trained model's calls, right or wrong."""
    for question, answer in list(zip(questions, answers, strict=True))[:count]:
        asked = next(message["content"] for message in question["messages"] if message["role"] == "user")
        mark = "accepted" if answer["correct"] else "not accepted"
        console.print(f"\n{asked}", markup=False, style="bold")
        console.print(f"{answer['text']}   ({mark})", markup=False)
    console.print()


def _peft_lines(gguf: pathlib.Path, adapter: pathlib.Path) -> str:
    return (
        "  import peft, transformers\n"
        f"  base = transformers.AutoModelForCausalLM.from_pretrained({str(gguf.parent)!r}, gguf_file={gguf.name!r})\n"
        f"  model = peft.PeftModel.from_pretrained(base, {str(adapter)!r})"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes from the last checkpoint")
    except (ValueError, FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"quickstart: {error}")
