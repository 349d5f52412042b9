#!/usr/bin/env python3
"""How long does a TPU take for products with packed kernels? Its compiler says, on a machine without one.

    python benchmarks/packed_products.py [--topology v5e] [--rows 1 16 2048] [--formats none,nf4,int8,mxfp4] [--dry]

Nothing is run. A loop over two layers, each a product up and one down of Llama 3.1 8B's sizes, is compiled for a TPU
that need not be present (`pip install 'jlora[tpu]'` brings the compiler): the values, and their gradient, for which
each layer is computed twice. The compiler estimates the cycles of what it places in a program; they are given for one
layer, beside those with kernels in bfloat16 ("none"). It has no estimate of gathers, so those are counted: a TPU
fetches their values one by one. --dry compiles small kernels for this machine's CPU, for which there are no estimates,
and writes nothing.
"""

import argparse
import itertools
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
import rich.console
import rich.progress
import rich.table
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import quant
from jlora.cli.main import COMPILERS
from jlora.train.planning import topology

LAYERS, INPUTS, OUTPUTS = 2, 4096, 14336
MIB = 2**20


def program(of_gradient: bool) -> Any:
    """A function of activations and of the layers' kernels."""

    def layer(x: jax.Array, kernels: tuple[Any, Any]) -> tuple[jax.Array, None]:
        up, down = kernels
        return quant.matmul(jax.nn.gelu(quant.matmul(x, up)), down), None

    def run(x: jax.Array, kernels: tuple[Any, Any]) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(layer), x, kernels)[0]

    def summed(x: jax.Array, kernels: tuple[Any, Any]) -> jax.Array:
        return jnp.sum(run(x, kernels).astype(jnp.float32))

    return jax.grad(summed) if of_gradient else run


def measure(where: str, rows: int, format: str, double_quant: bool, of_gradient: bool, sizes: tuple[int, int]) -> dict:
    """The figures of one program."""
    mesh = Mesh(np.array(topology.parse(where).devices()[:1]), ("device",))

    def kernel(inputs: int, outputs: int) -> Any:
        def made() -> Any:
            array = jnp.zeros((LAYERS, inputs, outputs), jnp.bfloat16)
            return array if format == "none" else quant.quantize(array, format, double_quant=double_quant)

        return jax.eval_shape(made)

    inputs, outputs = sizes
    shapes = jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16), (kernel(inputs, outputs), kernel(outputs, inputs))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    began = time.process_time()
    with jax.set_mesh(mesh):
        compiled = jax.jit(program(of_gradient)).lower(*placed).compile()
    text = compiled.as_text()
    # The body of a loop stands in the text once, before the entry.
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text.partition("\nENTRY ")[0])))
    used = compiled.memory_analysis()
    return {
        "rows": rows,
        "kernels": f"{format}, nested" if double_quant and format == "nf4" else format,
        "of": "gradient" if of_gradient else "values",
        "megacycles": round(cycles / 1e6, 3),
        "temporaries": round(used.temp_size_in_bytes / MIB, 1),
        "gathers": len(re.findall(r" gather\(", text)),
        "cpu seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    """Prints the programs as a table, and saves them as JSON in results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e", help="as for jlora plan (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 2048])
    parser.add_argument("--formats", default="none,nf4,int8,mxfp4")
    parser.add_argument("--dry", action="store_true", help="small kernels on this machine's CPU; nothing is written")
    options = parser.parse_args()
    options.topology = "cpu" if options.dry else options.topology
    if not topology.parse(options.topology).has_compiler:
        parser.error(f"no compiler here: pip install 'jlora[{topology.parse(options.topology).extra}]'")
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(COMPILERS)
    sizes = (128, 192) if options.dry else (INPUTS, OUTPUTS)
    kinds = [
        (format, nested) for format in options.formats.split(",") for nested in (False, True)[: 1 + (format == "nf4")]
    ]
    cases = list(itertools.product(options.rows, kinds, (False, True)))
    console = rich.console.Console()
    rows = [
        measure(options.topology, count, *kind, of_gradient, sizes)
        for count, kind, of_gradient in rich.progress.track(cases, "compiling", console=console, transient=True)
    ]
    dense = {(row["rows"], row["of"]): row["megacycles"] for row in rows if row["kernels"] == "none"}
    columns = ("megacycles", "times dense", "temporaries", "gathers", "cpu seconds")
    table = rich.table.Table(
        "rows",
        "kernels",
        "of",
        *(rich.table.Column(name, justify="right") for name in columns),
        caption="megacycles of one layer, by the compiler's estimate; temporaries in MiB",
    )
    for row in rows:
        base = dense.get((row["rows"], row["of"]))
        row["times dense"] = round(row["megacycles"] / base, 2) if base else None
        shown = (row[name] for name in columns)
        table.add_row(
            str(row["rows"]), row["kernels"], row["of"], *("" if value is None else str(value) for value in shown)
        )
    console.print(table)
    if not options.dry:
        name = f"packed_products_{options.topology.replace(':', '_')}"
        console.print(
            f"written: {record.save(name, {'options': vars(options), 'rows': rows}, device=options.topology)}"
        )


if __name__ == "__main__":
    main()
