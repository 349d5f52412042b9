#!/usr/bin/env python3
"""How fast is `jlora serve`, and does it hold under load?

    python benchmarks/serving.py --model=DIR [--rounds 5] [--new 64] [--minutes 1] [--clients 64] [--adapters 16]

First, sixteen clients at once against the decode loop of `jlora.generate` in one batch, on the same prompts: seconds
alternate in rounds, each round with prompts of its own, and medians are compared. Then a load: clients that ask without
a pause, over adapters with random weights, while other adapters are added to the folder and removed. Latencies are from
a request to its first text and to its end; a request is lost if it fails or gives another answer than before. The
server is a process of its own on the same machine, and the clients are OpenAI's.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import openai
import record
import rich.console
import rich.table

import jlora
from jlora import allocator
from jlora.generate import rollout

ROWS = 16
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wise", "owls", "sing"]


@contextlib.contextmanager
def server(options: argparse.Namespace, folder: pathlib.Path | None) -> Iterator[tuple[str, subprocess.Popen]]:
    """(the address, the process) of a server, which is ended with SIGTERM."""
    command = [sys.executable, "-m", "jlora", "serve", f"--model={options.model}", "--name=base", "--port=0"]
    command += [f"--length={options.length}", "--queue=4096", *([f"--adapters={folder}"] if folder else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        if not (found := re.search(r"http://\S+", line)):
            raise SystemExit(f"the server said {line!r}")
        try:
            yield found[0], process
        finally:
            process.terminate()


def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)


def prompts(round_number: int, count: int) -> list[str]:
    """Texts of some thirty words; none begins as another, so that none is known already."""
    generator = random.Random(round_number)
    return [f"{round_number} {number} " + " ".join(generator.choices(WORDS, k=30)) for number in range(count)]


def throughput(address: str, generate: Callable[[list[str]], None], *, rounds: int, new: int) -> dict:
    """Tokens a second of both, and how much of the batch's speed the server has.

    Args:
        generate: draws `new` tokens after each text, all in one batch.
    """
    asked, seconds = client(address), collections.defaultdict(list)
    with concurrent.futures.ThreadPoolExecutor(ROWS) as pool:

        def serve(texts: list[str]) -> None:
            settings = dict(model="base", max_tokens=new, temperature=0, extra_body={"ignore_eos": True})
            found = list(pool.map(lambda text: asked.completions.create(prompt=text, **settings), texts))
            assert all(answer.usage.completion_tokens == new for answer in found)

        for number in range(rounds + 1):
            texts = prompts(number, ROWS)
            for name, run in (("generate", generate), ("serve", serve)):
                start = time.perf_counter()
                run(texts)
                if number:  # the first compiles
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "clients": ROWS,
        "new_tokens": new,
        **{f"{name}_tokens_per_second": round(ROWS * new / value, 1) for name, value in medians.items()},
        "ratio": round(medians["generate"] / medians["serve"], 3),
    }


class Load:
    """Clients that ask without a pause, and what becomes of their requests."""

    def __init__(self, address: str, adapters: list[str], new: int) -> None:
        self._client, self._adapters, self._new = client(address), adapters, new
        self._texts = prompts(-1, 8)
        self._lock, self._answers = threading.Lock(), {}
        self.first, self.whole, self.tokens, self.lost = [], [], 0, []

    def ask(self, number: int, until: float) -> None:
        """Asks again and again until that time."""
        generator = random.Random(number)
        while time.monotonic() < until:
            name, text = generator.choice(self._adapters), generator.choice(self._texts)
            new = generator.randint(max(1, self._new // 4), self._new)
            try:
                self._ask_once(name, text, new)
            except Exception as error:  # noqa: BLE001 (whatever it is, the request is lost)
                with self._lock:
                    self.lost.append(f"{name}: {type(error).__name__}: {error}")

    def _ask_once(self, name: str, text: str, new: int) -> None:
        start, first, found, usage = time.perf_counter(), None, "", None
        settings = dict(max_tokens=new, temperature=0, stream=True, stream_options={"include_usage": True})
        for chunk in self._client.completions.create(model=name, prompt=text, **settings):
            first = first or time.perf_counter()
            found += chunk.choices[0].text if chunk.choices else ""
            usage = chunk.usage or usage
        end = time.perf_counter()
        with self._lock:
            # A longer answer begins with a shorter one, which ends with at most a part of a character.
            before = self._answers.setdefault((name, text), found)
            short, long = sorted((before.rstrip("\ufffd"), found.rstrip("\ufffd")), key=len)
            self._answers[name, text] = max(before, found, key=len)
            if not long.startswith(short):
                self.lost.append(f"{name}: answered {found!r}, and before {before!r}")
            self.first.append(first - start)
            self.whole.append(end - start)
            self.tokens += usage.completion_tokens


def load(address: str, folder: pathlib.Path, options: argparse.Namespace, memory: Callable[[], int]) -> dict:
    """What became of the requests of all clients in some minutes.

    Args:
        folder: that of the adapters, to which others are added while clients ask.
        memory: the server's resident bytes.
    """
    names = sorted(path.name for path in folder.iterdir())
    asked, start = Load(address, names, options.new), time.monotonic()
    until, seen, changes = start + 60 * options.minutes, [], 0
    with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
        running = [pool.submit(asked.ask, number, until) for number in range(options.clients)]
        while time.monotonic() < until:
            extra = folder / f"extra-{changes % 3}"
            if extra.exists():
                shutil.rmtree(extra)
            else:
                shutil.copytree(folder / names[changes % len(names)], extra)
            changes += 1
            seen.append(memory())
            time.sleep(min(options.every, max(0.0, until - time.monotonic())))
        for one in running:
            one.result()
    took = time.monotonic() - start

    def percentiles(values: list[float]) -> dict[str, float]:
        return {f"p{share}": round(float(np.percentile(values, share)), 2) for share in (50, 99)}

    third = max(1, len(seen) // 3)
    return {
        "clients": options.clients,
        "adapters": len(names),
        "minutes": options.minutes,
        "requests": len(asked.whole),
        "lost": len(asked.lost),
        "losses": asked.lost[:5],
        "tokens_per_second": round(asked.tokens / took, 1),
        "first_text_seconds": percentiles(asked.first),
        "request_seconds": percentiles(asked.whole),
        "folder_changes": changes,
        # After the first third, in which caches grow to what the requests need.
        "server_mib": [
            round(value / 2**20) for value in (seen[0], seen[third - 1], max(seen[third:] or seen), seen[-1])
        ],
    }


def resident(process: subprocess.Popen) -> int:
    """The resident bytes of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", pathlib.Path(f"/proc/{process.pid}/status").read_text())
    return 1024 * int(found[1])


def write_adapters(params: dict, folder: pathlib.Path, count: int, source: str) -> None:
    """Adapters of rank 8 on queries and values, with random weights small enough for texts."""
    for number in range(count):
        config = jlora.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=1)
        adapted = jlora.lora.init(params, config, jax.random.key(number))
        jlora.save_adapter(folder / f"adapter-{number:02}", adapted, base=source)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="a folder or GGUF file with a tokenizer")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--new", type=int, default=64, help="the most new tokens of an answer (default %(default)s)")
    made.add_argument("--length", type=int, default=512, help="of a prompt with its answer (default %(default)s)")
    made.add_argument("--minutes", type=float, default=1.0, help="of load (default %(default)s)")
    made.add_argument("--clients", type=int, default=64)
    made.add_argument("--adapters", type=int, default=16)
    made.add_argument("--every", type=float, default=3.0, help="seconds between changes of the folder")
    made.add_argument("--only", choices=("throughput", "load"))
    return made


def main() -> None:
    """Prints the figures of both parts, and saves them as JSON in results/."""
    options = parser().parse_args()
    allocator.keep_freed_pages()
    model, params = jlora.load(options.model)
    tokenizer = jlora.load_tokenizer(options.model)
    figures = {"options": vars(options) | {"model": pathlib.Path(options.model).name}}

    def generate(texts: list[str]) -> None:
        tokens = [tokenizer(text)["input_ids"] for text in texts]
        keys = jax.random.split(jax.random.key(0), len(tokens))
        settings = dict(rows=ROWS, max_new_tokens=options.new, stop_ids=(), temperature=0.0)
        rollout(model, params, tokens, keys, **settings)

    if options.only != "load":
        with server(options, None) as (address, _):
            figures["throughput"] = throughput(address, generate, rounds=options.rounds, new=options.new)
    if options.only != "throughput":
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            write_adapters(params, folder, options.adapters, options.model)
            with server(options, folder) as (address, process):
                figures["load"] = load(address, folder, options, lambda: resident(process))
    console = rich.console.Console()
    for part in [name for name in ("throughput", "load") if name in figures]:
        table = rich.table.Table(part, "")
        for name, value in figures[part].items():
            table.add_row(name.replace("_", " "), str(value))
        console.print(table)
    console.print(f"written: {record.save('serving', figures)}")


if __name__ == "__main__":
    main()
