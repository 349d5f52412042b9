#!/usr/bin/env python3
"""What do a server's programs take of a device's memory, and move through it? XLA's own compilers say.

    python benchmarks/serving_memory.py [--topology v5e] [--fsdp 1] [--quant nf4] [--rows 16] [--length 2048]
        [--adapters 16] [--dry]

Nothing is run: the step that draws a token in every row, and those that read pieces of prompts, are compiled for
devices that need not be present (`pip install 'jlora[tpu]'` or `'jlora[cuda13]'` brings the compiler), with the shapes
of Llama 3.1 8B in bfloat16 and a bank of adapters of rank 16 on all linears. Several devices (v5e:2x4) split heads and
hidden units, as with `jlora serve --mesh.tensor=-1`. The least that a step must move is its arguments once. What XLA
counts as moved holds what a fusion reads twice, so it says more of two forms of a program than of the device's seconds.
"""

import argparse
import functools
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import memory
import record
import rich.console
import rich.table

from jlora import lora, models, quant, sharding, tree
from jlora.cli.main import COMPILERS
from jlora.devices import GIB
from jlora.serve.programs import Programs
from jlora.train.planning import moved, topology
from jlora.types import Params

PIECES = ((1, 128), (4, 64))  # rows and tokens of the pieces of prompts that an engine reads by default
TINY = {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def shapes(model: models.Model, format: str | None, adapters: int) -> Params:
    """A bank's params as ShapeDtypeStructs, its base packed in `format`."""
    config = quant.as_config(format) if format else None

    def packed(path: str, leaf: Any) -> Any:
        found = config and quant.leaf_format(path, config)
        return jax.eval_shape(lambda: quant.quantize(jnp.zeros(leaf.shape, leaf.dtype), found)) if found else leaf

    def in_bank(path: str, leaf: Any) -> Any:
        own = {"lora_a": 2, "lora_b": 2, "lora_scale": 0}.get(path.rpartition("/")[2])
        if own is None:
            return leaf
        axis = len(leaf.shape) - own
        return jax.ShapeDtypeStruct((*leaf.shape[:axis], adapters + 1, *leaf.shape[axis:]), leaf.dtype)

    base = tree.map_with_path(packed, model.abstract_params(jnp.bfloat16))
    adapted = lora.LoraConfig(r=16, target_modules="all-linear")
    return tree.map_with_path(in_bank, jax.eval_shape(lambda base: lora.init(base, adapted, jax.random.key(0)), base))


def measure(options: argparse.Namespace) -> list[dict]:
    """A row of the table for each program."""
    model = models.build(TINY if options.dry else memory.MODELS["Llama-3.1-8B"])
    devices = topology.parse(options.topology).devices()
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=options.fsdp, tensor=-1), devices)
    params = shapes(model, options.quant, options.adapters)
    params = tree.abstract(params, sharding.tree_shardings(params, mesh))
    sizes = (options.length,)
    programs = Programs(model, params, options.rows, banked=True, sizes=sizes, shapes=PIECES)
    cache = programs.rows(options.length).cache.stacks
    wanted = {"a token in every row": lambda: programs.step(options.length)}
    for piece in PIECES:
        several, tokens = piece
        wanted[f"{several} × {tokens} tokens of prompts"] = functools.partial(programs.read, options.length, piece)
    found = []
    for name, compiled in wanted.items():
        began = time.process_time()
        compiled = compiled()
        used = compiled.memory_analysis()
        figures = dict(
            peak=used.peak_memory_in_bytes,
            arguments=used.argument_size_in_bytes,
            cache=sum(math.prod(own(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)),
            temporaries=used.temp_size_in_bytes,
            moved=(compiled.cost_analysis() or {}).get("bytes accessed", math.nan),  # not for GPUs
            received=sum(moved.received(compiled.as_text()).values()),
        )
        figures = {key: round(size / GIB, 3) for key, size in figures.items() if not math.isnan(size)}
        found.append({"program": name} | figures | {"cpu_seconds": round(time.process_time() - began, 1)})
    return found


def own(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of a device's part of an array."""
    return leaf.sharding.shard_shape(leaf.shape)


def main() -> None:
    """Prints the programs as a table, and saves them as JSON in results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e", help="as for jlora plan (default: %(default)s)")
    parser.add_argument("--fsdp", type=int, default=1, help="ways in which weights are split besides (default: 1)")
    parser.add_argument("--quant", choices=("none", *quant.FORMATS), default="nf4")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the cache (default: %(default)s)")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--dry", action="store_true", help="a tiny model on this machine's CPU; nothing is written")
    options = parser.parse_args()
    options.quant = None if options.quant == "none" else options.quant
    options.topology = "cpu" if options.dry else options.topology
    if not topology.parse(options.topology).has_compiler:
        parser.error(f"no compiler here: pip install 'jlora[{topology.parse(options.topology).extra}]'")
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(COMPILERS)
    rows = measure(options)
    columns = ("peak", "arguments", "cache", "temporaries", "moved", "received", "cpu_seconds")
    caption = "GiB of each device; the cache is a part of the arguments, received is what comes from other devices"
    table = rich.table.Table(
        "program", *(rich.table.Column(name, justify="right") for name in columns), caption=caption
    )
    for row in rows:
        table.add_row(row["program"], *(f"{row[name]:.2f}" if name in row else "" for name in columns))
    console = rich.console.Console()
    console.print(table)
    if not options.dry:
        name = f"serving_memory_{options.topology.replace(':', '_')}"
        figures = {"options": vars(options), "rows": rows}
        console.print(f"written: {record.save(name, figures, device=options.topology)}")


if __name__ == "__main__":
    main()
