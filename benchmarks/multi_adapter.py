#!/usr/bin/env python3
"""What does it cost if every row of a batch has its own adapter? Decoding with one adapter, and with a bank.

    python benchmarks/multi_adapter.py [--rows 64] [--rounds 3] [--new 32] [--quant nf4]
        [--adapters q_proj,v_proj:8 all-linear:16]

SmolLM2-135M's architecture with random weights, and adapters as PEFT makes them by default (rank 8 on queries and
values) and of rank 16 on all linears. Three runs: all rows with one adapter, all rows with one adapter of a bank, and
each row with its own from a bank of as many. Runs alternate in one process; seconds are medians and cover only decoding
(a run of `--new` tokens minus a run of one).
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import record
import rich.console
import rich.table
from step_time import SIZES

from jlora import allocator, lora, models, quant, tree
from jlora.generate import decode
from jlora.lora import Bank
from jlora.types import Params

MODEL = models.build(SIZES | {"model_type": "llama", "rope_theta": 1e5})


def adapter(base: Params, kind: str, seed: int) -> Params:
    """The leaves of an adapter (modules:rank) with a nonzero update."""
    modules, _, rank = kind.partition(":")
    names = modules if modules == "all-linear" else modules.split(",")
    config = lora.LoraConfig(r=int(rank), target_modules=names)
    leaves = lora.adapter_leaves(lora.init(base, config, jax.random.key(seed)))
    return tree.map_with_path(lambda path, leaf: leaf + 0.01 if path.endswith("lora_b") else leaf, leaves)


def runner(params: Params, options: argparse.Namespace, places: tuple | None) -> Callable[[int], None]:
    """A function that decodes a given number of tokens in every row."""
    rows = options.rows
    generator = np.random.default_rng(0)
    tokens = jnp.asarray(generator.integers(0, SIZES["vocab_size"], (rows, options.prompt)), jnp.int32)
    lengths, keys = jnp.full(rows, options.prompt, jnp.int32), jax.random.split(jax.random.key(0), rows)

    def run(new: int) -> None:
        decode(
            MODEL,
            params,
            tokens,
            lengths,
            keys,
            rows=rows,
            max_new_tokens=new,
            stop_ids=(),
            greedy=True,
            adapters=places,
        ).tokens.block_until_ready()

    return run


def measure(base: Params, kind: str, options: argparse.Namespace) -> list[dict]:
    """A row of the table for each run with adapters of one kind."""
    adapters = {str(number): adapter(base, kind, number) for number in range(options.rows)}
    bank = Bank.of(base, adapters)
    runs = {
        "one adapter": runner(lora.overlay(base, adapters["0"]), options, None),
        "one of the bank": runner(bank.params, options, bank.places(["0"] * options.rows)),
        "each row its own": runner(bank.params, options, bank.places(list(adapters))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(options.rounds + 1):
        for name, run in runs.items():
            took = []
            for new in (1, options.new):
                start = time.perf_counter()
                run(new)
                took.append(time.perf_counter() - start)
            if round_number:  # the first one compiles
                seconds[name].append(took[1] - took[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(lora.adapter_leaves(bank.params)))
    return [
        {
            "adapters": kind,
            "run": name,
            "bank_mb": round(held / 1e6),
            "tokens_per_second": round(options.rows * (options.new - 1) / value, 1),
            "ratio": round(medians["one adapter"] / value, 3),
        }
        for name, value in medians.items()
    ]


def main() -> None:
    """Prints the three runs as a table, and saves them as JSON in results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument(
        "--adapters",
        nargs="+",
        default=["q_proj,v_proj:8", "all-linear:16"],
        metavar="MODULES:RANK",
        help="kinds of adapters, measured one after the other (default %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded in a row (default %(default)s)")
    parser.add_argument("--quant", choices=quant.FORMATS, help="pack the base (default: float32)")
    options = parser.parse_args()
    if wrong := [kind for kind in options.adapters if not re.fullmatch(r"[^:]+:[1-9]\d*", kind)]:
        parser.error(f"--adapters: found {wrong}, expected MODULES:RANK, such as q_proj,v_proj:8")
    allocator.keep_freed_pages()
    base = jax.jit(MODEL.random_params)(jax.random.key(0))
    if options.quant:
        config = quant.as_config(options.quant)
        base = tree.map_with_path(
            lambda path, leaf: quant.quantize(leaf, options.quant) if quant.leaf_format(path, config) else leaf, base
        )
    rows = [row for kind in options.adapters for row in measure(base, kind, options)]
    table = rich.table.Table("adapters", "run", "bank, MB", "tokens/s", "of one adapter's speed")
    for row in rows:
        table.add_row(
            row["adapters"], row["run"], str(row["bank_mb"]), str(row["tokens_per_second"]), f"{row['ratio']:.2f}"
        )
    console = rich.console.Console()
    console.print(table)
    console.print(f"written: {record.save('multi_adapter', {'options': vars(options), 'rows': rows})}")


if __name__ == "__main__":
    main()
