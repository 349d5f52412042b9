#!/usr/bin/env python3
"""How fast do chats become tokens, beside TRL, how much memory does it take, and how soon does a run begin again?

    python benchmarks/encoding.py [--records 1000 10000 100000] [--messages 4] [--words 20 60] [--rounds 3] [--alone]
    python benchmarks/encoding.py --lengths
    python benchmarks/encoding.py --stored 10000 1000000

A tokenizer of 32,000 tokens trained on Python's standard library, Qwen 3's template (with TRL the one that it trains
with), messages of 20 to 60 words in a JSONL file. Each side runs in a process of its own, in turns: reading the file,
tokens and masks; jlora also plans an epoch of packed rows and lays out the first batch, and does all of that once more
from its cache. Memory is the peak beyond what imports and tokenizer take, in the first of the processes; mapped files
are part of it. `--alone` leaves TRL out.
`--stored` writes tokens of made-up records (300 to 700 each, files of 1.8 kB a record) to the cache and begins a second
run from there, which plans three epochs of packed rows and lays out a batch: what is left of a start when nothing has
to be rendered or tokenized.
`--lengths` times jlora on chats of 2 to 80 messages, in one process, by CPU time.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import pathlib
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from collections.abc import Callable, Iterator

import numpy as np
import record
import rich.console
import rich.table
import tokenizers
import transformers

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
SIZE = 32_000
SEQ_LEN = 16_384
LENGTHS = (2, 10, 20, 40, 80)

Tokenizer = transformers.PreTrainedTokenizerFast


def train_tokenizer(folder: pathlib.Path, files: str = "*.py") -> None:
    """Writes a tokenizer of bytes with Qwen 3's template, trained on these files of the standard library."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train([str(path) for path in _library(files)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    templates = pathlib.Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(folder)


def chats(count: int, messages: int, least: int = 20, most: int = 60) -> Iterator[dict]:
    """Chats of random words, `least` to `most` in a message."""
    draw = random.Random(count)
    words = sorted({word for path in _library("a*.py") for word in path.read_text().split() if word.isalpha()})
    for _ in range(count):
        texts = [" ".join(draw.choices(words, k=draw.randint(least, most))) for _ in range(messages)]
        roles = itertools.cycle(("user", "assistant"))
        yield {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def _library(pattern: str) -> list[pathlib.Path]:
    return sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob(pattern))


def jlora(path: pathlib.Path, tokenizer: Tokenizer, cache: str) -> Callable[[], object]:
    """What is timed of jlora."""
    from jlora import data

    def make(writer: data.Writer, note: Callable[[str], None]) -> tuple[data.Items, data.EncodeReport]:
        records = data.iterate_records(path, note=note)
        return data.encode_items(records, tokenizer, seq_len=SEQ_LEN, note=note, writer=writer)

    def run() -> object:
        items, _ = data.cached(cache, path, tokenizer, {"seq_len": SEQ_LEN}, make, lambda message: None, least=0)
        steps = data.plan_items(items, seq_len=SEQ_LEN, batch_size=4, packing=True, epochs=1)
        return next(data.loader(items, steps, by_item=False))

    return run


def trl(workers: int | None, path: pathlib.Path, tokenizer: Tokenizer, cache: str) -> Callable[[], object]:
    """What is timed of TRL: its trainer's preparation of a data set, without a model."""
    import datasets
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template

    template = get_training_chat_template(tokenizer)
    trainer = types.SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=False)
    settings = SFTConfig(
        output_dir=cache, assistant_only_loss=True, max_length=None, dataset_num_proc=workers, bf16=False, use_cpu=True
    )

    def run() -> object:
        records = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        return SFTTrainer._prepare_dataset(trainer, records, tokenizer, settings, False, None, "train")

    return run


SIDES = {
    "jlora": jlora,
    "TRL, one process": functools.partial(trl, None),
    "TRL, two processes": functools.partial(trl, 2),
}


def measure(side: str, path: pathlib.Path, folder: pathlib.Path, cache: str) -> None:
    """Prints the seconds of one side, and by how much its resident memory grew, as JSON."""
    run = SIDES[side](path, transformers.AutoTokenizer.from_pretrained(folder), cache)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, start = _peak(), time.perf_counter()
    run()
    print(json.dumps({"seconds": time.perf_counter() - start, "MiB": _peak() - before}))


def _peak() -> float:
    """The peak of this process's resident memory, in MiB."""
    return int(re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024


def compare(options: argparse.Namespace, folder: pathlib.Path) -> dict:
    """For each number of records and side, records a second and the peak; and jlora's from its cache."""
    figures = {}
    for count in options.records:
        path = folder / f"{count}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps(chat) + "\n" for chat in chats(count, options.messages, *options.words))
        sides = ("jlora",) if options.alone else tuple(SIDES)
        found = {name: [] for name in (*sides, "jlora, from its cache")}
        for _ in range(options.rounds):
            for side in sides:
                with tempfile.TemporaryDirectory() as cache:
                    for name in (side, "jlora, from its cache") if side == "jlora" else (side,):
                        command = [sys.executable, __file__, "--side", side, "--paths", path, folder, cache]
                        output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
                        found[name].append(json.loads(output.splitlines()[-1]))
        figures[str(count)] = {"file_MiB": round(path.stat().st_size / 2**20, 1)} | {
            name: {
                "seconds": round(seconds := statistics.median(one["seconds"] for one in runs), 3),
                "records_per_second": round(count / seconds, 1),
                "MiB": round(statistics.median(one["MiB"] for one in runs), 1),
            }
            for name, runs in found.items()
        }
        show(count, figures[str(count)])
    return figures


def stored(count: int, path: pathlib.Path, tokenizer: Tokenizer, cache: str) -> dict:
    """The seconds and the peak of what begins with made-up tokens, or with those in the cache."""
    from jlora import data

    lengths, tokens = np.random.default_rng(0).integers(300, 700, count).tolist(), np.arange(700, dtype=np.int32)

    def make(writer: data.Writer, note: Callable[[str], None]) -> tuple[data.Items, data.EncodeReport]:
        for length in lengths:
            writer.add(data.Item((data.Example(tokens[:length], tokens[:length] > length // 2),)))
        return writer.finish(), data.EncodeReport(count, sum(lengths), sum(lengths) // 2, range(count), 0, 0, 0)

    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, start = _peak(), time.perf_counter()
    items, _ = data.cached(cache, path, tokenizer, {}, make, lambda message: None, least=0)
    tokens_there = time.perf_counter()
    steps = data.plan_items(items, seq_len=2048, batch_size=32, packing=True, epochs=3)
    planned = time.perf_counter()
    next(data.loader(items, steps, by_item=False))
    seconds = {"tokens": tokens_there - start, "plan": planned - tokens_there, "batch": time.perf_counter() - planned}
    return {"seconds": {name: round(value, 2) for name, value in seconds.items()}, "MiB": round(_peak() - before, 1)}


def of_stored(counts: list[int], folder: pathlib.Path) -> dict:
    """What `stored` finds for these numbers of records: when they are made, and from the cache."""
    figures = {}
    for count in counts:
        path, words = folder / f"{count}.jsonl", "lorem ipsum dolor sit amet consetetur sadipscing elitr " * 16
        with path.open("w") as file:
            for number in range(count):
                said = [{"role": "user", "content": f"{number}{words}"}, {"role": "assistant", "content": words}]
                file.write(json.dumps({"messages": said}) + "\n")
        command = [sys.executable, __file__, "--stored", str(count), "--paths", path, folder, folder / f"cache{count}"]
        figures[str(count)] = {"file_MiB": round(path.stat().st_size / 2**20, 1)}
        for name in ("made", "from its cache"):
            output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            figures[str(count)][name] = json.loads(output.splitlines()[-1])
        print(f"{count:,} records: {figures[str(count)]}")
        path.unlink()
    return figures


def show(count: int, figures: dict) -> None:
    """Prints the table of one number of records."""
    table = rich.table.Table("", "seconds", "records/s", "peak, MiB", title=f"{count:,} records")
    for name, one in figures.items():
        if name == "file_MiB":
            continue
        table.add_row(name, f"{one['seconds']:.2f}", f"{one['records_per_second']:,.0f}", f"{one['MiB']:.0f}")
    rich.console.Console().print(table)


def by_length(folder: pathlib.Path, rounds: int) -> dict:
    """Milliseconds of CPU time that a chat takes, by its number of messages: the least of some rounds."""
    from jlora import data

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    figures = {}
    for messages in LENGTHS:
        records = list(chats(max(12, 1000 // messages), messages))
        times = []
        for _ in range(rounds):
            start = time.process_time()
            data.encode(records, tokenizer, seq_len=SEQ_LEN)
            times.append(time.process_time() - start)
        figures[str(messages)] = round(1e3 * min(times) / len(records), 3)
        print(f"{messages} messages: {figures[str(messages)]} ms")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--messages", type=int, default=4)
    parser.add_argument("--words", type=int, nargs=2, default=[20, 60], help="least and most words of a message")
    parser.add_argument("--alone", action="store_true", help="only jlora")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", action="store_true", help="only the time by the number of messages")
    parser.add_argument("--stored", type=int, nargs="+", help="only what begins with tokens, for so many records")
    parser.add_argument("--out", type=pathlib.Path, help="where the figures go instead of benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="a small tokenizer: whether everything runs")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.paths:
        path, folder, cache = options.paths
        if options.stored:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            print(json.dumps(stored(options.stored[0], pathlib.Path(path), tokenizer, cache)))
            return
        measure(options.side, pathlib.Path(path), pathlib.Path(folder), cache)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        train_tokenizer(folder, "a*.py" if options.dry else "*.py")
        if options.stored:
            record.save("encoding_stored", of_stored(options.stored, folder), device="cpu", path=options.out)
            return
        figures = {"milliseconds_by_messages": by_length(folder, options.rounds)}
        if not options.lengths:
            figures |= {
                "messages": options.messages,
                "words": options.words,
                "rounds": options.rounds,
                "records": compare(options, folder),
            }
            record.save("encoding", figures, device="cpu", path=options.out)


if __name__ == "__main__":
    main()
