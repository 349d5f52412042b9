#!/usr/bin/env python3
"""What does reading a prompt once for all its answers save? DPO and GRPO steps with data.share_prompts on and off.

    python benchmarks/shared_prompts.py [--rounds 5] [--prompt 256] [--answer 32]

SmolLM2-135M's architecture with random weights, float32, r=16 on all linears; four pairs, or two groups of eight
completions; lengths vary by a quarter. Steps alternate in one process, and seconds are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import record
import rich.console
import rich.table
from step_time import ALPHA, LEARNING_RATE, RANK, SIZES

from jlora import allocator, data, lora, models, sharding
from jlora.optim import OptimConfig, make_optimizer
from jlora.train.algorithms.dpo import DPOConfig, dpo_loss
from jlora.train.algorithms.grpo import grpo_loss
from jlora.train.config import resolve
from jlora.train.state import create_state
from jlora.train.step import Objective, make_step

MODEL = models.build(SIZES | {"model_type": "llama", "rope_theta": 1e5})


def answers(prompts: int, items: int, sides: int, options: argparse.Namespace) -> list[data.Item]:
    """Random items of `sides` answers each, `items` for each of `prompts` prompts."""
    generator = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        size = generator.integers(length * 3 // 4, length * 5 // 4)
        return generator.integers(0, SIZES["vocab_size"], size).astype(np.int32)

    found = []
    for _ in range(prompts):
        prompt = draw(options.prompt)
        for _ in range(items):
            documents = [np.concatenate([prompt, draw(options.answer)]) for _ in range(sides)]
            marked = [data.Example(tokens, np.arange(len(tokens)) >= len(prompt)) for tokens in documents]
            found.append(data.Item(tuple(marked), {}))
    return found


def make_batch(items: list[data.Item], prompts: list[int], share: bool, options: argparse.Namespace) -> data.Batch:
    """All items as one micro-batch."""
    length = 2 * (options.prompt + options.answer)
    settings = dict(packing=False, bucket=64, epochs=1, shuffle=False)
    if share:
        settings |= dict(share=True, prompts=prompts)
        rows = len(data.plan_items(items, seq_len=length, batch_size=1, **settings))
    else:
        rows = len(items)
    [step] = data.plan_items(items, seq_len=length, batch_size=rows, **settings)
    batch = data.collate_items(items, step)
    return batch | {
        "advantages": np.sin(np.arange(batch["weights"].size, dtype=np.float32)).reshape(batch["weights"].shape),
        "sampler_log_probs": np.zeros_like(batch["weights"]),
    }


def stepper(objective: Objective, batch: data.Batch) -> Callable[[], None]:
    """A function that runs one optimizer step."""
    params = lora.init(
        MODEL.random_params(jax.random.key(0)), lora.LoraConfig(r=RANK, lora_alpha=ALPHA), jax.random.key(1)
    )
    frozen, trainable = lora.split(params)
    optimizer = make_optimizer(OptimConfig(learning_rate=LEARNING_RATE, schedule="constant"), 1000)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    state = create_state(trainable, optimizer, 0, mesh)
    step = make_step(objective, optimizer, jax.tree.map(lambda leaf: leaf.sharding, state))
    constants = {"policy": frozen, "reference": {}}

    def run() -> None:
        nonlocal state
        state, metrics = step(state, constants, sharding.put_batch(batch, mesh))
        assert np.isfinite(float(metrics["loss"]))

    return run


def measure(name: str, objective: Objective, items: list[data.Item], prompts: list[int], options: argparse.Namespace):
    """The figures of one objective: places in the batch and median seconds, with and without sharing."""
    batches = {share: make_batch(items, prompts, share, options) for share in (True, False)}
    steps = {share: stepper(objective, batch) for share, batch in batches.items()}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for round_number in range(options.rounds + 1):
        for share, step in steps.items():
            start = time.perf_counter()
            step()
            if round_number:  # the first one compiles
                seconds[share].append(time.perf_counter() - start)
    medians = {share: statistics.median(values) for share, values in seconds.items()}
    return {
        "step": name,
        "places": {("shared" if share else "apart"): int(b["tokens"].size) for share, b in batches.items()},
        "seconds": {("shared" if share else "apart"): round(value, 3) for share, value in medians.items()},
        "ratio": round(medians[False] / medians[True], 2),
    }


def main() -> None:
    """Prints both steps as a table, and saves them as JSON in results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer (default %(default)s)")
    options = parser.parse_args()
    allocator.keep_freed_pages()
    settings = {
        "algorithm": "grpo",
        "model": {"path": "-"},
        "data": {"path": "-"},
        "train": {"steps": 1, "batch_size": 16, "remat": False},
        "rollout": {"rewards": ("-",)},
    }
    cases = [
        ("DPO, 4 pairs", dpo_loss(MODEL, DPOConfig(), remat=False), answers(4, 1, 2, options), list(range(4))),
        (
            "GRPO, 2 groups of 8",
            grpo_loss(MODEL, resolve(settings)),
            answers(2, 8, 1, options),
            [number // 8 for number in range(16)],
        ),
    ]
    rows = [measure(*case, options) for case in cases]
    table = rich.table.Table("step", "tokens, shared", "apart", "seconds, shared", "apart", "times faster")
    for row in rows:
        values = [*row["places"].values(), *row["seconds"].values(), row["ratio"]]
        table.add_row(row["step"], *map(str, values))
    console = rich.console.Console()
    console.print(table)
    console.print(f"written: {record.save('shared_prompts', {'options': vars(options), 'rows': rows})}")


if __name__ == "__main__":
    main()
