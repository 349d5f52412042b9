#!/usr/bin/env python3
"""What does a packed base cost and save in decoding, beside transformers? Tokens per second and memory of each format.

    python benchmarks/packed_decoding.py [--formats transformers,float32,bfloat16,int8,nf4] [--dtype float32]
        [--rows 1,16]

SmolLM2-135M's architecture with random weights and a LoRA adapter on all linears, greedy decoding. `transformers` is
its `generate` in float32 with PEFT's adapter. Each format has its own process, and they take turns. What a packed
format does not pack (embeddings, norms, activations) is in `--dtype`, by default float32, in which CPUs are fast.
Seconds are medians and cover only decoding (a run of `--new` tokens minus a run of one). Memory is that of the weights,
and the process's peak resident set (as Linux counts it) beyond what it had before it made them, so this runs on CPUs
only.
"""

import argparse
import ctypes
import functools
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
import rich.console
import rich.progress
import rich.table
from step_time import SIZES

from jlora import lora, models, quant, tree
from jlora.generate import decode
from jlora.types import Params

PEER = "transformers"
Decode = Callable[[np.ndarray, int], None]  # (tokens [rows, prompt], how many to decode after them)
DENSE = ("float32", "bfloat16", "float16")
MIB = 2**20


def weights(model: models.Model, format: str, dtype: str) -> Params:
    """Random params in a format, made and packed leaf by leaf, with an adapter; unpacked leaves are in `dtype`."""
    dense = jnp.dtype(format if format in DENSE else dtype)
    rules = None if format in DENSE else quant.as_config(format)

    @functools.partial(jax.jit, static_argnames=("shape", "packed"))
    def make(key: jax.Array, shape: tuple[int, ...], packed: str | None) -> Any:
        values = 0.02 * jax.random.normal(key, shape, dense)
        return quant.quantize(values, packed) if packed else values

    flat = tree.flatten(model.abstract_params(dense))
    keys = jax.random.split(jax.random.key(0), len(flat))
    made = {
        path: make(key, leaf.shape, quant.leaf_format(path, rules) if rules else None)
        for key, (path, leaf) in zip(keys, flat.items(), strict=True)
    }
    return lora.init(tree.unflatten(made), lora.LoraConfig(r=16, target_modules="all-linear"), jax.random.key(1))


def memory(what: str) -> int:
    """Memory of this process in bytes: "VmRSS" is the current value, "VmHWM" the peak since `forget_peak`."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def forget_peak() -> None:
    """Returns memory that glibc kept from making the weights and compiling, and restarts the peak."""
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def ours(format: str, options: argparse.Namespace) -> tuple[int, int, Decode]:
    """Bytes of the weights, of the process before they were made, and what decodes."""
    jnp.zeros(1).block_until_ready()
    before = memory("VmRSS")
    model = models.build(SIZES | {"model_type": "llama", "rope_theta": 1e5})
    params = weights(model, format, options.dtype)

    def decoded(tokens: np.ndarray, new: int) -> None:
        rows, width = tokens.shape
        lengths, keys = jnp.full(rows, width, jnp.int32), jax.random.split(jax.random.key(0), rows)
        settings = dict(rows=rows, max_new_tokens=new, stop_ids=(), greedy=True)
        decode(model, params, jnp.asarray(tokens, jnp.int32), lengths, keys, **settings).tokens.block_until_ready()

    return tree.nbytes(params), before, decoded


def theirs(options: argparse.Namespace) -> tuple[int, int, Decode]:
    """The same of transformers and PEFT."""
    import peft
    import torch
    import transformers

    before = memory("VmRSS")
    config = transformers.LlamaConfig(**SIZES, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    adapter = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config).eval(), adapter)

    def decoded(tokens: np.ndarray, new: int) -> None:
        ids = torch.from_numpy(tokens)
        settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
        with torch.inference_mode():
            assert model.generate(input_ids=ids, **settings).shape == (len(tokens), tokens.shape[1] + new)

    return sum(value.nbytes for value in model.parameters()), before, decoded


def work(pipe: Connection, format: str, options: argparse.Namespace) -> None:
    """Holds one format and decodes on request: sends (bytes of the weights, peak bytes), then seconds per request."""
    generator = np.random.default_rng(0)
    nbytes, before, decoded = (theirs if format == PEER else functools.partial(ours, format))(options)

    def run(rows: int, new: int) -> float:
        tokens = generator.integers(1, SIZES["vocab_size"], (rows, options.prompt))
        start = time.perf_counter()
        decoded(tokens, new)
        return time.perf_counter() - start

    for rows in options.rows:  # to compile
        run(rows, 1), run(rows, options.new)
    forget_peak()
    run(max(options.rows), options.new)
    pipe.send((nbytes, memory("VmHWM") - before))
    while (rows := pipe.recv()) is not None:
        pipe.send(run(rows, options.new) - run(rows, 1))


def answer(pipe: Connection, format: str, rows: int | None = None) -> Any:
    """What the format's process sends next; with `rows`, its answer to the request to decode that many rows."""
    try:
        if rows:
            pipe.send(rows)
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise SystemExit(f"{format}: its process has ended before it was done; what it said is above") from None


def main() -> None:
    """Prints every format as a row of a table, and saves them as JSON in results/."""
    options = _parse()
    if (platform := jax.default_backend()) != "cpu":
        raise SystemExit(f"memory is measured on the host, and weights lie on {platform}: set JAX_PLATFORMS=cpu")
    context = multiprocessing.get_context("spawn")
    pipes, sizes = {}, {}
    console = rich.console.Console()
    with rich.progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task("decoding", total=len(options.formats) * (1 + options.rounds * len(options.rows)))
        for format in options.formats:  # one at a time: they compile, and would disturb each other
            pipes[format], theirs = context.Pipe()
            context.Process(target=work, args=(theirs, format, options), daemon=True).start()
            theirs.close()  # otherwise the pipe would stay open after that process has ended
            sizes[format] = answer(pipes[format], format)
            bar.advance(task)
        seconds: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.rounds):
            for rows in options.rows:
                for format, pipe in pipes.items():
                    seconds.setdefault((format, rows), []).append(answer(pipe, format, rows))
                    bar.advance(task)
    for pipe in pipes.values():
        pipe.send(None)
    found = [
        {
            "format": format,
            "not_packed": format if format in DENSE else "float32" if format == PEER else options.dtype,
            "weights_mib": round(sizes[format][0] / MIB),
            "peak_mib": round(sizes[format][1] / MIB),
            "tokens_per_second": {
                str(rows): round(rows * (options.new - 1) / statistics.median(seconds[format, rows]), 1)
                for rows in options.rows
            },
        }
        for format in options.formats
    ]
    table = rich.table.Table(
        *("base", "not packed", "weights MiB", "peak MiB", *(f"tokens/s, {rows} rows" for rows in options.rows)),
        caption="memory: of the process on the host (resident set)",
    )
    for row in found:
        speeds = [str(speed) for speed in row["tokens_per_second"].values()]
        table.add_row(row["format"], row["not_packed"], str(row["weights_mib"]), str(row["peak_mib"]), *speeds)
    console.print(table)
    console.print(f"written: {record.save('packed_decoding', {'options': vars(options), 'rows': found})}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", type=_formats, default=[PEER, "float32", "bfloat16", "int8", "nf4"])
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of what a format does not pack (default %(default)s)",
    )
    parser.add_argument("--rows", type=lambda text: [int(rows) for rows in text.split(",")], default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=33, help="tokens decoded in a row (default %(default)s)")
    return parser.parse_args()


def _formats(text: str) -> list[str]:
    known, found = (PEER, *DENSE, *quant.FORMATS), text.split(",")
    if unknown := [format for format in found if format not in known]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return found


if __name__ == "__main__":
    main()
