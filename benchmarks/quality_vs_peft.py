#!/usr/bin/env python3
"""Does jlora's QLoRA learn as much as PEFT's LoRA? Both learn function calling from the same weights and batches.

    python benchmarks/quality_vs_peft.py [--dtype=f32] [--steps=20 --questions=10] [--skip-peft]

Prints a table and writes it as JSON, with device, versions and commit, to benchmarks/results/.
Requires the packages of `pip install 'jlora[test]'`.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

# torch and JAX share the device here, so JAX must not reserve most of its memory at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import record
import rich.console
import rich.table

import jlora
from jlora import data
from jlora.train import loop
from jlora.train.config import resolve
from jlora.train.evaluation import metrics
from jlora.train.evaluation.records import evaluate
from jlora.train.reporting.progress import Progress

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASK = ROOT / "scripts" / "function_calling.py"
DTYPES = {"bf16": "bfloat16", "f32": "float32"}
RANK, ALPHA, LEARNING_RATE, BATCH_SIZE, SEQ_LEN, BUCKET, MAX_NEW_TOKENS = 16, 32, 1e-3, 4, 512, 64, 128

Numbers = dict[str, float]


def main() -> None:
    """Prepares the data, trains and evaluates both, prints and writes the results."""
    options = _parse()
    console = rich.console.Console()
    work = options.work.expanduser()
    subprocess.run([sys.executable, TASK, "prepare", f"--out={work / 'data'}", f"--cache={options.cache}"], check=True)
    source = next(options.cache.expanduser().rglob("*.gguf"))
    test = data.read_records(work / "data" / "test.jsonl")[: options.questions]
    metric = metrics.load(str(TASK))

    results = {"before": evaluate_jlora(source, None, test, metric, dtype=options.dtype, quant=None)}
    if not options.skip_peft:
        results["PEFT LoRA"] = run_peft(source, work, test, metric, options)
    results["jlora QLoRA (NF4)"] = run_jlora(source, work, test, metric, options)

    console.print(_table(results, options))
    console.print(f"written: {_write(results, options)}")


def run_jlora(source: pathlib.Path, work: pathlib.Path, test: list[data.Record], metric: Any, options: Any) -> Numbers:
    """Scores and seconds of a run as on the command line, from reading the model to the saved adapter."""
    workdir = work / f"jlora-{time.strftime('%Y%m%d-%H%M%S')}"
    settings = {
        "model": {"path": str(source), "dtype": DTYPES[options.dtype], "quant": "nf4"},
        "lora": {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"},
        "data": {"path": str(work / "data" / "train.jsonl"), "packing": False, "bucket": BUCKET},
        "optim": {"learning_rate": LEARNING_RATE, "schedule": "linear"},
        "train": {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "seed": options.seed, "save_every": 10_000},
    }
    settings["train"] |= {"steps": options.steps} if options.steps else {"epochs": 1.0}
    start = time.perf_counter()
    with Progress(sys.stderr) as progress:
        loop.run(resolve(settings), str(workdir), progress=progress)
    seconds = time.perf_counter() - start
    scores = evaluate_jlora(source, workdir / "adapter", test, metric, dtype=options.dtype, quant="nf4")
    return scores | _speed(_batches(source, work, options), seconds)


def evaluate_jlora(
    source: pathlib.Path,
    adapter: pathlib.Path | None,
    test: list[data.Record],
    metric: Any,
    *,
    dtype: str,
    quant: str | None,
) -> Numbers:
    """Loss and scores of the model, with the adapter if one is given."""
    model, params = jlora.load(source, dtype=DTYPES[dtype], quant=quant)
    if adapter is not None:
        params = jlora.load_adapter(params, adapter)
    tokenizer = jlora.load_tokenizer(source)
    settings = dict(max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE * 4, seq_len=SEQ_LEN)
    numbers, _ = metrics.scored(metric, test, *evaluate(model, params, tokenizer, test, **settings))
    return {name: numbers[name] for name in ("loss", "correct", "valid_json")}


def run_peft(source: pathlib.Path, work: pathlib.Path, test: list[data.Record], metric: Any, options: Any) -> Numbers:
    """Scores and seconds of PEFT on the same weights and batches, from reading the model to the trained adapter."""
    import peft
    import torch
    import transformers

    folder = work / "transformers"
    tokenizer = jlora.load_tokenizer(source)
    if not (folder / "config.json").is_file():
        jlora.save_model(folder, *jlora.load(source, dtype="float32"), tokenizer=tokenizer)
    batches = _batches(source, work, options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPES[options.dtype]))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base.to(device), config)
    _train_peft(model, batches)
    seconds = time.perf_counter() - start
    model.eval()
    scores = _evaluate_peft(model, tokenizer, test, metric)
    return scores | _speed(batches, seconds)


def _batches(source: pathlib.Path, work: pathlib.Path, options: Any) -> list[data.Batch]:
    """The batches of the run; jlora plans the same ones from the same settings."""
    records = data.read_records(work / "data" / "train.jsonl")
    examples, _ = data.encode(records, jlora.load_tokenizer(source), seq_len=SEQ_LEN)
    steps = data.plan(
        [len(example.tokens) for example in examples],
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        packing=False,
        bucket=BUCKET,
        seed=options.seed,
        epochs=None if options.steps else 1.0,
        steps=options.steps,
    )
    return [data.collate(examples, step) for step in steps]


def _train_peft(model: Any, batches: list[data.Batch]) -> None:
    """Trains with AdamW, linear decay to zero and clipping at 1: jlora's defaults except for the schedule."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    model.train()
    for number, batch in enumerate(batches, start=1):
        loss, tokens = _torch_loss(model, batch)
        loss = loss / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number % 10 == 0 or number == len(batches):
            print(f"PEFT step {number}/{len(batches)}  loss {loss.item():.3f}", file=sys.stderr, flush=True)


def _torch_loss(model: Any, batch: data.Batch) -> tuple[Any, Any]:
    """(sum of the loss over the completion tokens, their number)."""
    import torch

    rows = {name: torch.from_numpy(values[0]).to(model.device) for name, values in batch.items()}
    mask = (rows["segment_ids"] > 0).long()
    logits = model(input_ids=rows["tokens"].long(), attention_mask=mask).logits
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), rows["targets"].long().flatten(), reduction="none"
    )
    return (losses * rows["weights"].flatten()).sum(), rows["weights"].sum()


def _evaluate_peft(model: Any, tokenizer: Any, test: list[data.Record], metric: Any) -> Numbers:
    import torch

    examples, _ = data.encode(test, tokenizer, seq_len=SEQ_LEN, overlong="cut")
    lengths = [len(example.tokens) for example in examples]
    steps = data.plan(lengths, seq_len=SEQ_LEN, batch_size=BATCH_SIZE, packing=False, epochs=1, shuffle=False)
    with torch.no_grad():
        sums = [_torch_loss(model, data.collate(examples, step)) for step in steps]
        texts = []
        for start in range(0, len(test), BATCH_SIZE * 4):
            texts += _generate_peft(model, tokenizer, test[start : start + BATCH_SIZE * 4])
    scores = [metric.function(record, text) for record, text in zip(test, texts, strict=True)]
    loss = sum(float(loss) for loss, _ in sums) / sum(float(tokens) for _, tokens in sums)
    return {"loss": loss} | {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _generate_peft(model: Any, tokenizer: Any, records: list[data.Record]) -> list[str]:
    prompts = [data.split_prompt(record)[0] for record in records]
    texts = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) for prompt in prompts]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    found = model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _speed(batches: list[data.Batch], seconds: float) -> Numbers:
    tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    return {"steps": len(batches), "seconds": seconds, "tokens_per_second": tokens / seconds}


def _table(results: dict[str, Numbers], options: Any) -> rich.table.Table:
    table = rich.table.Table(title=f"function calling, {options.questions} questions, {options.dtype}, {_device()}")
    columns = {
        "correct": ("correct", lambda value: f"{100 * value:.0f} %"),
        "valid_json": ("valid JSON", lambda value: f"{100 * value:.0f} %"),
        "loss": ("eval loss", lambda value: f"{value:.3f}"),
        "seconds": ("training", lambda value: f"{value:.0f} s"),
        "tokens_per_second": ("tokens/s", lambda value: f"{value:.0f}"),
    }
    table.add_column("")
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    for name, numbers in results.items():
        table.add_row(name, *(show(numbers[key]) if key in numbers else "" for key, (_, show) in columns.items()))
    return table


def _write(results: dict[str, Numbers], options: Any) -> pathlib.Path:
    settings = {
        "dtype": options.dtype,
        "seed": options.seed,
        "questions": options.questions,
        "r": RANK,
        "lora_alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
        "schedule": "linear",
        "batch_size": BATCH_SIZE,
        "seq_len": SEQ_LEN,
        "steps": options.steps,
    }
    return record.save("quality_vs_peft", {"settings": settings, "results": results})


def _device() -> str:
    device = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="f32", help="of the weights and the computation")
    parser.add_argument("--steps", type=int, help="stop after this many steps (default: one epoch)")
    parser.add_argument("--questions", type=int, default=100, help="how many test questions are asked")
    parser.add_argument("--skip-peft", action="store_true", help="train with jlora alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", type=pathlib.Path, default=pathlib.Path("~/.cache/jlora/quality"), help="for what is made"
    )
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("~/.cache/jlora"), help="for downloads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
