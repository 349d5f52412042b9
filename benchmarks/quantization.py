#!/usr/bin/env python3
"""What does each packed format cost? The error of a real model's weights, and its effect on the model's predictions.

    python benchmarks/quantization.py [--records=24] [--calibration=4]

Prints a table and writes it as JSON, with device, versions and commit, to benchmarks/results/. The model is
SmolLM2-135M-Instruct as the package index has it, in Q4_1: its weights have already been rounded once to 4 bits, on a
uniform grid, so formats differ in other ways than on a model that was never rounded. The texts are the test
conversations of scripts/function_calling.py, with every token counted; mixtures are chosen on the training ones.
"""

import argparse
import functools
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
import rich.console
import rich.table

import jlora
from jlora import data, quant, tree
from jlora.hub.checkpoints.packed import quantizable
from jlora.train.evaluation.sensitivity import measure

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASK = ROOT / "scripts" / "function_calling.py"
BITS, SEQ_LEN, CALIBRATION_LEN, BATCH = 4.5, 256, 64, 4

Numbers = dict[str, float]


def main() -> None:
    """Measures every format, prints and writes the results."""
    options = _parse()
    console = rich.console.Console()
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, TASK, "prepare", f"--out={work}", f"--cache={options.cache}"], check=True)
        train, test = (data.read_records(pathlib.Path(work) / f"{name}.jsonl") for name in ("train", "test"))
    source = next(options.cache.expanduser().rglob("*.gguf"))
    tokenizer = jlora.load_tokenizer(source)
    model, dense = load(source, None)
    texts = rows(tokenizer, test[: options.records])
    expected = [predictions(model, dense, tokens, mask) for tokens, mask in texts]

    start = time.perf_counter()
    nf4 = quant.QuantConfig(rules=quantizable("nf4"))
    calibration = train[: options.calibration]
    damage = measure(model, dense, tokenizer, calibration, nf4, count=options.calibration, seq_len=CALIBRATION_LEN)
    measured_in = time.perf_counter() - start
    results: dict[str, Numbers] = {}
    for name, config in configurations(dense, damage, nf4).items():
        model, params = load(source, config)
        results[name] = weights(dense, params, model.config.num_hidden_layers) | divergence(
            model, params, texts, expected
        )
        console.print(name, {key: round(value, 4) for key, value in results[name].items()})
    console.print(_table(results))
    console.print(f"written: {_write(results, measured_in, options, sum(int(mask.sum()) for _, mask in texts))}")


def configurations(dense: Any, damage: Numbers, nf4: quant.QuantConfig) -> dict[str, quant.QuantConfig | None]:
    """Name → what is packed and how."""

    def whole(format: str, double_quant: bool) -> quant.QuantConfig:
        return quant.QuantConfig(rules=quant.as_config(format).rules, double_quant=double_quant)

    found = quant.candidates(dense, nf4)
    return {
        "bf16": None,
        "int8": whole("int8", False),
        "NF4": whole("nf4", False),
        "NF4, double": whole("nf4", True),
        "FP4": whole("fp4", False),
        "FP4, double": whole("fp4", True),
        "int4": whole("int4", False),
        "int4, double": whole("int4", True),
        f"NF4 + bf16, {BITS} bits by divergence": quant.choose(found, damage, BITS, nf4),
        f"NF4 + int8, {BITS} bits by divergence": quant.choose(found, damage, BITS, nf4, spare="int8"),
        f"NF4 + bf16, {BITS} bits by weight error": quant.choose(found, quant.weight_damage(dense, nf4), BITS, nf4),
    }


def load(source: pathlib.Path, config: quant.QuantConfig | None) -> tuple[Any, Any]:
    """The model with bfloat16 weights, or packed ones made from them, for computing in float32."""
    model, params = jlora.load(source, dtype="bfloat16", quant=config)
    return model, tree.map_with_path(
        lambda _, leaf: leaf if quant.is_packed(leaf) else leaf.astype(jnp.float32), params
    )


def rows(tokenizer: Any, records: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of the records' first SEQ_LEN tokens, each with a mask of real tokens."""
    examples, _ = data.encode(records, tokenizer, seq_len=4 * SEQ_LEN, overlong="cut")
    batches = []
    for start in range(0, len(examples), BATCH):
        tokens = np.zeros((BATCH, SEQ_LEN), np.int32)
        mask = np.zeros((BATCH, SEQ_LEN), bool)
        for row, example in enumerate(examples[start : start + BATCH]):
            cut = example.tokens[:SEQ_LEN]
            tokens[row, : len(cut)], mask[row, : len(cut)] = cut, True
        batches.append((tokens, mask))
    return batches


@functools.partial(jax.jit, static_argnums=0)
def predictions(model: Any, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-probabilities [B, T, V] of every next token."""
    return jax.nn.log_softmax(model(params, tokens, segment_ids=mask.astype(jnp.int32)), axis=-1)


def divergence(model: Any, params: Any, texts: list, expected: list[jax.Array]) -> Numbers:
    """Perplexity over all tokens, and the mean KL divergence from the unpacked model's predictions."""
    loss, difference, count, places = 0.0, 0.0, 0, 0
    for (tokens, mask), wanted in zip(texts, expected, strict=True):
        found = predictions(model, params, tokens, mask)
        there = mask[:, 1:]
        chosen = jnp.take_along_axis(found[:, :-1], jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        loss -= float(jnp.sum(jnp.where(there, chosen, 0)))
        kl = jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1)
        difference += float(jnp.sum(jnp.where(mask, kl, 0)))
        count, places = count + int(there.sum()), places + int(mask.sum())
    return {"perplexity": math.exp(loss / count), "divergence": difference / places}


def weights(dense: Any, params: Any, layers: int) -> Numbers:
    """Bits per weight of the layers' linears (16 if not packed), and the relative error of their weights."""
    error, norm, bits, size = 0.0, 0.0, 0.0, 0
    flat = tree.flatten(dense)
    for path, leaf in tree.flatten(params).items():
        stack = tree.stack_of(path)
        if stack is None or not path.endswith("/kernel"):
            continue
        values = quant.dequantize(leaf, jnp.float32) if quant.is_packed(leaf) else leaf
        original = flat[f"{stack.name}/{stack.rest}"][np.asarray(stack.indices(layers))]
        error += float(jnp.sum((values - original) ** 2))
        norm += float(jnp.sum(original**2))
        bits += 8 * tree.nbytes(leaf) if quant.is_packed(leaf) else 16 * leaf.size
        size += leaf.size
    return {"bits": bits / size, "weight_error": math.sqrt(error / norm)}


def _table(results: dict[str, Numbers]) -> rich.table.Table:
    table = rich.table.Table("", *(rich.table.Column(name, justify="right") for name in next(iter(results.values()))))
    for name, numbers in results.items():
        table.add_row(name, *(f"{value:.4g}" for value in numbers.values()))
    return table


def _write(results: dict[str, Numbers], measured_in: float, options: argparse.Namespace, tokens: int) -> pathlib.Path:
    settings = {
        "model": "SmolLM2-135M-Instruct, Q4_1 (its weights had been rounded to 4 bits before)",
        "texts": f"{options.records} test conversations of scripts/function_calling.py, {tokens} tokens, all counted",
        "calibration": f"{options.calibration} training conversations, {CALIBRATION_LEN} tokens each",
    }
    numbers = {name: {key: round(value, 6) for key, value in row.items()} for name, row in results.items()}
    return record.save(
        "quantization", {"settings": settings, "measure_seconds": round(measured_in), "formats": numbers}
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--records", type=int, default=24, help="test conversations (default: 24)")
    parser.add_argument("--calibration", type=int, default=4, help="training conversations (default: 4)")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("~/.cache/jlora"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
