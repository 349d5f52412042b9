"""What do layers without attention cost? A hybrid's LoRA step beside that of the same model with attention only.

    python benchmarks/hybrids.py                    # 1 × 1024 tokens, two periods of layers of each model, float32
    python benchmarks/hybrids.py --length 4096 --only delta

Each model is a published one with fewer layers and tokens, so that a laptop runs it, and random weights. Both sides are
jlora's, r=16 on all linears, AdamW, layers recomputed, in one process; steps alternate and seconds are medians. The
attention of the other side has the hybrid's own heads. Since the two differ in what they compute, speeds are also given
as a share of each other by floating-point operation: below 1.0, the hybrid makes less of the device.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import record
import rich.console
import rich.progress
import rich.table
import transformers
from step_time import ALPHA, RANK, jlora_step

from jlora import lora, models
from jlora.train.reporting import usage

NAME = "hybrids"
ATTENTION = "full_attention"
# Mixer → transformers' class, and the sizes of a published model with two periods of its layers and a small vocabulary.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "delta": (  # Qwen3.5-0.8B
        "qwen3_5_text",
        dict(
            hidden_size=1024,
            intermediate_size=3584,
            num_attention_heads=8,
            num_key_value_heads=2,
            linear_num_key_heads=16,
            linear_num_value_heads=16,
            layer_types=(["linear_attention"] * 3 + [ATTENTION]) * 2,
        ),
    ),
    "conv": (  # LFM2-350M
        "lfm2",
        dict(
            hidden_size=1024,
            intermediate_size=6656,
            num_attention_heads=16,
            layer_types=["conv", "conv", ATTENTION, "conv", "conv", ATTENTION, "conv", ATTENTION],
        ),
    ),
    "mamba": (  # Granite 4.0 H 350M, with attention twice as often
        "granitemoehybrid",
        dict(
            hidden_size=768,
            shared_intermediate_size=2048,
            num_local_experts=0,
            num_experts_per_tok=0,
            num_attention_heads=12,
            num_key_value_heads=4,
            mamba_n_heads=48,
            mamba_d_head=32,
            mamba_d_state=128,
            layer_types=(["linear_attention"] * 4 + [ATTENTION]) * 2,
        ),
    ),
}


def fields(mixer: str, attention_only: bool) -> dict[str, Any]:
    """The config.json of the hybrid, or of the same model with attention in every layer."""
    kind, sizes = MODELS[mixer]
    sizes = sizes | dict(vocab_size=4096, num_hidden_layers=len(sizes["layer_types"]))
    if attention_only:
        sizes |= dict(layer_types=[ATTENTION] * len(sizes["layer_types"]))
    return transformers.CONFIG_MAPPING[kind](**sizes).to_dict()


def operations(config: dict[str, Any], batch: int, length: int) -> float:
    """A step's floating-point operations, without those of recomputed layers."""
    model = models.build(config)

    def adapted() -> Any:
        key = jax.random.key(0)
        return lora.init(model.random_params(key), lora.LoraConfig(r=RANK, lora_alpha=ALPHA), key)

    return batch * length * usage.flops_per_token(model.config, *lora.split(jax.eval_shape(adapted)), length)


def seconds_of(steps: dict[str, Callable[[], None]], rounds: int, advance: Callable[[], None]) -> dict[str, float]:
    """Median seconds of the steps, which take turns after one each that compiles."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if turn:
                found[name].append(time.perf_counter() - begun)
            advance()
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Measures, prints and writes each mixer's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=MODELS)
    options = parser.parse_args()
    mixers = [options.only] if options.only else [*MODELS]
    console, rows = rich.console.Console(), {}
    with rich.progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task("steps", total=2 * (options.rounds + 1) * len(mixers))
        for mixer in mixers:
            configs = {"hybrid": fields(mixer, False), "attention": fields(mixer, True)}
            steps = {
                name: jlora_step(None, options.batch, options.length, True, config) for name, config in configs.items()
            }
            seconds = seconds_of(steps, options.rounds, lambda: bar.advance(task))
            speeds = {
                name: operations(config, options.batch, options.length) / seconds[name]
                for name, config in configs.items()
            }
            rows[mixer] = {
                "seconds": seconds,
                "gflops_per_second": {name: speed / 1e9 for name, speed in speeds.items()},
                "time_ratio": seconds["hybrid"] / seconds["attention"],
                "speed_ratio": speeds["hybrid"] / speeds["attention"],
            }
    record.save(NAME, {"batch": options.batch, "length": options.length, "mixers": rows})
    table = rich.table.Table("mixer", "hybrid, s", "attention only, s", "time ×", "operations a second ×")
    for mixer, row in rows.items():
        seconds = row["seconds"]
        numbers = (seconds["hybrid"], seconds["attention"], row["time_ratio"], row["speed_ratio"])
        table.add_row(mixer, *(f"{number:.2f}" for number in numbers))
    console.print(table)


if __name__ == "__main__":
    main()
