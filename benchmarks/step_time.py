"""Training speed and peak memory of one LoRA and one QLoRA step: jlora against PEFT + torch, alternating in one run.

    python benchmarks/step_time.py                 # 4 × 256 tokens on SmolLM2-135M's architecture, float32
    python benchmarks/step_time.py --rounds 3      # quicker

Both sides have random weights, r=16 on all linears, AdamW, and the loss on every token. PEFT runs without gradient
checkpointing, which is its faster setting. Each side has its own process, so that neither's thread pool or allocator
disturbs the other; steps alternate (ours, theirs, ours, …) and the seconds are medians. Memory is the high-water mark
of the process's whole resident set over whole steps.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIZES = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
)
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-3


LLAMA = SIZES | dict(model_type="llama", rope_theta=1e5)


def tokens(batch: int, length: int, vocab_size: int = SIZES["vocab_size"]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length))


def jlora_step(
    quant: str | None, batch: int, length: int, remat: bool, fields: dict[str, Any] = LLAMA
) -> Callable[[], None]:
    """A function that runs one optimizer step in jlora, of the model that the fields of a config.json describe."""
    import jax

    import jlora
    from jlora import allocator, models, sharding, tree
    from jlora.optim import OptimConfig, make_optimizer
    from jlora.train.algorithms.sft import sft_loss
    from jlora.train.state import create_state
    from jlora.train.step import make_step

    allocator.keep_freed_pages()  # as `jlora train` does
    model = models.build(fields)
    params = model.random_params(jax.random.key(0))
    config = jlora.quant.as_config(quant)
    params = tree.map_with_path(
        lambda path, leaf: leaf if jlora.quant.leaf_format(path, config) is None else jlora.quant.quantize(leaf), params
    )
    params = jlora.lora.init(params, jlora.LoraConfig(r=RANK, lora_alpha=ALPHA), jax.random.key(1))
    frozen, trainable = jlora.lora.split(params)
    optimizer = make_optimizer(OptimConfig(learning_rate=LEARNING_RATE, schedule="constant"), 1000)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    state = create_state(trainable, optimizer, 0, mesh)
    del params, trainable
    step = make_step(sft_loss(model, remat=remat), optimizer, jax.tree.map(lambda leaf: leaf.sharding, state))
    ids = tokens(batch, length, model.config.vocab_size).astype(np.int32)[None]
    arrays = {
        "tokens": ids,
        "targets": np.roll(ids, -1, axis=2),
        "weights": np.ones(ids.shape, np.float32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape),
        "segment_ids": np.ones_like(ids),
    }

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, sharding.put_batch(arrays, mesh))
        assert np.isfinite(float(metrics["loss"]))

    return run


def peft_step(quant: str | None, batch: int, length: int, remat: bool) -> Callable[[], None]:
    """A function that runs one optimizer step in PEFT + torch (+ bitsandbytes)."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        options = {}
        if quant:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if quant:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=remat)
    elif remat:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    ids = torch.from_numpy(tokens(batch, length))

    def run() -> None:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert np.isfinite(loss.item())

    return run


STEPS = {"jlora": jlora_step, "peft": peft_step}


class Side:
    """One side in its own process, which runs a step on request."""

    def __init__(self, name: str, quant: str | None, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--child", name, "--quant", quant or "none"]
        command += ["--batch", str(options.batch), "--length", str(options.length)] + ["--remat"] * options.remat
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the child)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.step()  # answered when the child is ready

    def step(self) -> dict[str, float]:
        """Has the child run a step; returns its `seconds` and the `peak_gib` of all steps so far."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self._errors.read()}\n{' '.join(self._process.args)} ended with code {code}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(quant: str | None, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds per step and peak GiB of both sides, which take turns."""
    sides = {name: Side(name, quant, options) for name in STEPS}
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            answers[name].append(side.step())
    for side in sides.values():
        side.close()
    seconds = {name: statistics.median(answer["seconds"] for answer in found) for name, found in answers.items()}
    return seconds, {name: found[-1]["peak_gib"] for name, found in answers.items()}


def child(options: argparse.Namespace) -> None:
    """One side: runs a step for every line on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = STEPS[options.child](None if options.quant == "none" else options.quant, *_sizes(options))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark: loading is not part of a step
    step()
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        status = pathlib.Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        print(json.dumps({"seconds": seconds, "peak_gib": peak / 2**20}), file=answers, flush=True)


def _sizes(options: argparse.Namespace) -> tuple[int, int, bool]:
    return options.batch, options.length, options.remat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--remat", action="store_true", help="recompute layers in the backward pass, on both sides")
    parser.add_argument("--only", choices=("lora", "qlora"))
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--quant", default="none", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    rows = []
    for name, quant in (("lora", None), ("qlora", "nf4")):
        if options.only in (None, name):
            seconds, memory = compare(quant, options)
            rows.append({"method": name, "seconds": seconds, "peak_gib": memory})
    report(rows, options)


def report(rows: list[dict], options: argparse.Namespace) -> None:
    """Prints the table and saves it as JSON in results/."""
    import record
    import rich
    import rich.table

    table = rich.table.Table(
        title=f"one training step, {options.batch} × {options.length} tokens, float32, r={RANK} on all linears"
    )
    for column in ("method", "side", "seconds", "tokens/s", "ratio", "peak GiB"):
        table.add_column(column, justify="left" if column in ("method", "side") else "right")
    for row in rows:
        for side, seconds in row["seconds"].items():
            ratio = row["seconds"]["peft"] / seconds
            rate = options.batch * options.length / seconds
            table.add_row(
                row["method"],
                side,
                f"{seconds:.2f}",
                f"{rate:.0f}",
                f"{ratio:.2f}",
                f"{row['peak_gib'][side]:.2f}",
            )
    rich.print(table)
    record.save("step_time", {"batch": options.batch, "length": options.length, "remat": options.remat, "rows": rows})


if __name__ == "__main__":
    main()
