#!/usr/bin/env python3
"""Which projections does NF4 hurt? The predictions of a hybrid with one kind of linear packed, beside its own.

    python benchmarks/sensitivity.py [--length 512]

Qwen3.5-0.8B's sizes with two periods of layers and random weights as transformers starts them (no trained one is small
enough to come with a package): this shows what the layout does with an error, not what training has put into a
projection. Each kind of linear is packed alone, in all layers; then all of them, all but those that the family leaves
out by default (`quant="nf4"`), and mixtures of a given mean of bits that `jlora quantize --bits` chooses by the
weights' error. Divergence is the mean KL divergence of the next token's distribution, in units of 1e-6 nats.
"""

import argparse
import re
import tempfile

import hybrids
import jax
import jax.numpy as jnp
import numpy as np
import record
import rich.console
import rich.progress
import rich.table
import torch
import transformers

import jlora
from jlora import quant, tree
from jlora.models import Model
from jlora.types import Params

NAME = "sensitivity"
BITS = (4.5, 5.0)
# Linears of layers alone, without the rules of the families.
NF4 = quant.QuantConfig(rules=((r"layers/.*/kernel", "nf4"),))


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    model, dense = _model()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, options.length))
    predict = jax.jit(lambda params: jax.nn.log_softmax(model(params, jnp.asarray(tokens))))
    expected, rows, console = predict(dense), {}, rich.console.Console()
    chosen = configurations(dense)
    for name, config in rich.progress.track(chosen.items(), "packing", console=console, transient=True):
        params, share, bits = pack(dense, config)
        found = predict(params)
        divergence = float(jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)))
        rows[name] = {"packed": share, "bits": bits, "divergence": divergence}
    record.save(NAME, {"length": options.length, "rows": rows})
    table = rich.table.Table(
        rich.table.Column("packed in NF4", no_wrap=True),
        "% of linears",
        "bits a weight",
        "divergence, 1e-6",
        "per % packed",
    )
    for name, row in rows.items():
        share, divergence = 100 * row["packed"], 1e6 * row["divergence"]
        table.add_row(name, f"{share:.2f}", f"{row['bits']:.2f}", f"{divergence:.1f}", f"{divergence / share:.2f}")
    console.print(table)


def configurations(dense: Params) -> dict[str, quant.QuantConfig]:
    """Name → what is packed: each kind of linear, all, those that the family packs by default, mixtures."""
    every, default = quant.candidates(dense, NF4), quant.as_config("nf4")
    kinds = sorted({found.name.split("/", 2)[2] for found in every})
    alone = {kind.removesuffix("/kernel"): _only(f"layers/{re.escape(kind)}") for kind in kinds}
    damage = quant.weight_damage(dense, default)
    mixed = {
        f"by default, to {bits} bits": quant.choose(quant.candidates(dense, default), damage, bits, default)
        for bits in BITS
    }
    return alone | {"all": NF4, "by default": default} | mixed


def _only(pattern: str) -> quant.QuantConfig:
    return quant.QuantConfig(rules=((pattern, "nf4"),))


def pack(dense: Params, config: quant.QuantConfig) -> tuple[Params, float, float]:
    """The weights with those packed that `config` names, the share of linears that this is, and bits per weight."""
    every = quant.candidates(dense, NF4)
    found = quant.candidates(dense, config)
    places, size = {(kernel.path, kernel.index) for kernel in found}, sum(kernel.size for kernel in every)
    bits = sum(
        quant.bits_of(kernel, "nf4" if (kernel.path, kernel.index) in places else None, config) for kernel in every
    )

    def packed(path: str, leaf: jax.Array) -> jax.Array:
        layers = [(path, index) in places for index in range(leaf.shape[0])]
        if not any(layers):
            return leaf
        values = quant.dequantize(quant.quantize(leaf), leaf.dtype)
        return jnp.where(jnp.asarray(layers)[:, None, None], values, leaf)

    return tree.map_with_path(packed, dense), sum(kernel.size for kernel in found) / size, bits / size


def _model() -> tuple[Model, Params]:
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(**hybrids.fields("delta", attention_only=False))
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return jlora.load(folder)


if __name__ == "__main__":
    main()
