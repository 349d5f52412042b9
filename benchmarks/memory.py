#!/usr/bin/env python3
"""How much device memory does a training step take? XLA's own compilers say, beside the figures that others publish.

    python benchmarks/memory.py [--only=h100|tpu] [--cases=NAME,NAME] [--dry]

Only the shapes in a config.json are read, and nothing is run: as `jlora plan` does, the script compiles the whole SFT
step for devices that need not be present (`pip install 'jlora[cuda13]'` and `'jlora[tpu]'` bring the compilers), one
case at a time, each in its own process. Rank 16 on all linears, NF4 with double quantisation, AdamW and remat="full",
unless a case says otherwise. CPU seconds are those of tracing and compiling the step.

The table is printed, and saved as JSON with versions and commit in benchmarks/results/. A case that is left out, or
that has no compiler here, keeps its figures there; each has its own date and commit.
"""

import argparse
import concurrent.futures
import datetime
import json
import math
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import record
import rich.console
import rich.progress
import rich.table
import transformers

from jlora import kernels
from jlora.cli.main import COMPILERS
from jlora.devices import DEVICES, GIB
from jlora.errors import UserError
from jlora.models import decoder
from jlora.train.config import RunConfig, resolve
from jlora.train.planning import topology
from jlora.train.planning.forecast import Forecast, forecast

NAME = "memory"
LLAMA = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    hidden_act="silu",
    rms_norm_eps=1e-5,
    vocab_size=128256,
    max_position_embeddings=131072,
    torch_dtype="bfloat16",
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
ROPE = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def _llama(hidden: int, inner: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
    return LLAMA | dict(rope_parameters=ROPE) | sizes | others


MODELS = {
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, tie_word_embeddings=True),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "Llama-3-70B": _llama(
        8192, 28672, 80, 64, max_position_embeddings=8192, rope_parameters=dict(rope_type="default", rope_theta=5e5)
    ),
    "tiny": _llama(32, 64, 2, 4, vocab_size=256, num_key_value_heads=2, head_dim=8),
}
MODELS["Qwen3-30B-A3B"] = LLAMA | dict(
    model_type="qwen3_moe",
    architectures=["Qwen3MoeForCausalLM"],
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=True,
    vocab_size=151936,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
)


def _published(kind: str, **changes: Any) -> dict[str, Any]:
    """The config of transformers' class for this model_type, whose defaults are the sizes of a published model."""
    return transformers.CONFIG_MAPPING[kind](**changes).to_dict() | dict(torch_dtype="bfloat16")


ATTENTION = "full_attention"
# A model for each way of mixing tokens, or of keeping weights, that Llama lacks.
MECHANISMS = {
    "Qwen3.5-9B": _published("qwen3_5_text"),
    "Qwen3.5-35B-A3B": _published("qwen3_5_moe_text"),
    "Gemma-4-E2B": _published(
        "gemma4_text",
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        num_key_value_heads=1,
        layer_types=[*["sliding_attention"] * 4, ATTENTION] * 7,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "Gemma-4-31B": _published(
        "gemma4_text",
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
        sliding_window=1024,
        hidden_size_per_layer_input=0,
    ),
    "gpt-oss-20b": _published("gpt_oss", num_hidden_layers=24, num_local_experts=32)
    | dict(quantization_config=dict(quant_method="mxfp4")),
    "Ministral-3-8B": _published("ministral3"),
    "LFM2-1.2B": _published(
        "lfm2", hidden_size=2048, num_hidden_layers=16, full_attn_idxs=[2, 5, 8, 10, 12, 14], layer_types=None
    ),
    "Granite-4.0-H-Micro": _published(
        "granitemoehybrid",
        vocab_size=100352,
        hidden_size=2048,
        shared_intermediate_size=8192,
        num_hidden_layers=40,
        num_key_value_heads=8,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=64,
        mamba_d_state=128,
        layer_types=[ATTENTION if layer % 10 == 5 else "linear_attention" for layer in range(40)],
        tie_word_embeddings=True,
    ),
    "GLM-4.7-Flash": _published("glm4_moe_lite"),
}
MODELS |= MECHANISMS
DEPTHS = (8, 20, 80)  # layers of the 8B's size: one body is compiled for any number of them
MODELS |= {f"{layers} layers": _llama(4096, 14336, layers, 32) for layers in DEPTHS}


# Group → settings; None: without the group.
Settings = dict[str, dict[str, Any] | None]


class Aim(NamedTuple):
    """The most that a case may take, in GiB and CPU seconds."""

    peak: float | None = None
    received: float | None = None
    cpu_seconds: float | None = None


class Case(NamedTuple):
    """A step to compile.

    Attributes:
        peer: who else has published a figure, and which.
        settings: differences from the settings that all cases share.
        plain_attention, whole_mlp: use forms that jlora avoids where memory matters.
        cost: roughly how many CPU seconds it takes, for the progress bar.
    """

    name: str
    topology: str
    model: str
    rows: int
    tokens: int
    aim: Aim = Aim()
    peer: str = ""
    settings: tuple[Settings, ...] = ()
    plain_attention: bool = False
    whole_mlp: bool = False
    cost: int = 10

    @property
    def group(self) -> str:
        return "h100" if self.topology.startswith("h100") else "tpu"


Row = dict[str, Any]

R32 = {"lora": {"r": 32, "lora_alpha": 64}}
OFFLOAD = {"train": {"remat": "offload"}}
CARD_24GB, CARD_80GB = (round(DEVICES[name].usable / GIB, 2) for name in ("rtx4090", "h100"))

DRY = Case("dry", "cpu", "tiny", 1, 32, Aim(peak=1.0))
H100 = (
    Case("8b-2x2048", "h100", "Llama-3.1-8B", 2, 2048, Aim(7.3), "torchtune: 7.4 GB"),
    Case("3b-2x4096", "h100", "Llama-3.2-3B", 2, 4096, Aim(4.5), "torchtune: 4.6 GB"),
    Case("70b-1x2048", "h100", "Llama-3-70B", 1, 2048, Aim(43), "QLoRA's paper: 48 GB"),
    Case("8b-1x8192", "h100", "Llama-3.1-8B", 1, 8192, Aim(9.0)),
    Case("a3b-1x16384", "h100", "Qwen3-30B-A3B", 1, 16384),
    Case("8b-1x32768", "h100", "Llama-3.1-8B", 1, 32768, Aim(17), settings=(R32,)),
    Case("8b-1x32768-offload", "h100", "Llama-3.1-8B", 1, 32768, Aim(10), settings=(R32, OFFLOAD)),
    Case(
        "8b-24gb",
        "h100",
        "Llama-3.1-8B",
        1,
        157_696,
        Aim(CARD_24GB),
        "Unsloth in 24 GB: 78,475 tokens",
        settings=(R32, OFFLOAD),
        cost=20,
    ),
    Case(
        "8b-80gb",
        "h100",
        "Llama-3.1-8B",
        1,
        704_512,
        Aim(CARD_80GB),
        "Unsloth in 80 GB: 342,733 tokens",
        settings=(R32, OFFLOAD),
        cost=90,
    ),
    Case(
        "70b-80gb",
        "h100",
        "Llama-3-70B",
        1,
        180_224,
        Aim(CARD_80GB),
        "Unsloth in 80 GB: 89,389 tokens",
        settings=(R32, OFFLOAD),
        cost=25,
    ),
)
TPU = (
    Case("v5e-8b-1x2048", "v5e", "Llama-3.1-8B", 1, 2048, Aim(7.0, cpu_seconds=90), cost=90),
    Case(
        "v5e-8b-4x2048-fsdp4",
        "v5e:2x2",
        "Llama-3.1-8B",
        4,
        2048,
        Aim(3.0, received=5.5),
        settings=({"mesh": {"fsdp": 4}},),
        cost=150,
    ),
    Case(
        "v5e-70b-8x2048-fsdp8",
        "v5e:2x4",
        "Llama-3-70B",
        8,
        2048,
        Aim(10.5),
        settings=({"mesh": {"fsdp": 8}},),
        cost=200,
    ),
)
DENSE, FULL = {"model": {"quant": None}}, {"lora": None}
FULL_TUNING = tuple(
    Case(
        f"{name}-8b-full-{ways}x2048-{weights}",
        devices,
        "Llama-3.1-8B",
        ways,
        2048,
        settings=(DENSE, FULL, {"full": {"weights": weights}}, {"mesh": {"fsdp": ways}}),
        cost=cost,
    )
    for name, devices, ways, cost in (("h100x8", "h100x8", 8, 30), ("v5e", "v5e:4x4", 16, 250))
    for weights in ("masters", "stochastic")
)
# gpt-oss keeps the packing that it is published in.
AS_PUBLISHED = DENSE
FAMILIES = tuple(
    case
    for model in MECHANISMS
    for settings in [(AS_PUBLISHED,) if "gpt-oss" in model else ()]
    for case in (
        Case(f"{model}-1x8192", "h100", model, 1, 8192, settings=settings, cost=30),
        Case(
            f"v5e-{model}-8x2048-fsdp8",
            "v5e:2x4",
            model,
            8,
            2048,
            settings=(*settings, {"mesh": {"fsdp": 8}}),
            cost=200,
        ),
    )
)
KEPT = {"train": {"remat": "none"}}


def _technique(name: str, *settings: Settings, **forms: bool) -> Case:
    return Case(name, "h100", "Llama-3.1-8B", 2, 2048, settings=settings, **forms)


# The first case, adding one technique at a time.
TECHNIQUES = (
    _technique("0-bf16", DENSE, KEPT, plain_attention=True, whole_mlp=True),
    _technique("1-remat", DENSE, plain_attention=True, whole_mlp=True),
    _technique("2-nf4", plain_attention=True, whole_mlp=True),
    _technique("3-attention", whole_mlp=True),
    _technique("4-mlp-tiles"),
    _technique("5-offload", OFFLOAD),
)
COMPILING = tuple(Case(f"{layers}-layers", "h100", f"{layers} layers", 2, 2048) for layers in DEPTHS)
CASES = (*H100, *TECHNIQUES, *COMPILING, *TPU, *FULL_TUNING, *FAMILIES)


def main() -> None:
    """Compiles the cases, prints and writes what they need."""
    options = _parse()
    cases = [DRY] if options.dry else _wanted(options.only, options.cases)
    # For the child processes: they leave this machine's accelerators alone, and libtpu does not look for a cloud's.
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(COMPILERS, JAX_PLATFORMS="cpu")
    console = rich.console.Console()
    with tempfile.TemporaryDirectory() as work:
        rows = _measured(cases, _write_models(pathlib.Path(work)), console, writes=not options.dry)
    console.print(_table(cases, rows))


def _measured(cases: list[Case], folder: pathlib.Path, console: rich.console.Console, writes: bool) -> dict[str, Row]:
    """Name → figures; they are saved after each case, so that an interrupted run loses only one."""
    rows: dict[str, Row] = {}
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    # One case takes longer than the 30 seconds over which the bar estimates its speed by default.
    with rich.progress.Progress(*columns, console=console, transient=True, speed_estimate_period=3600) as bar:
        task = bar.add_task("compiling", total=sum(case.cost for case in cases))
        for case in cases:
            bar.update(task, description=case.name)
            rows[case.name] = apart(case, folder)
            bar.advance(task, case.cost)
            found = rows[case.name]
            said = found.get("fault") or f"{found['peak']:.2f} GiB"
            console.print(f"{case.name}: {said}", highlight=False)
            if writes:
                record.save(NAME, {"cases": kept(rows)})
    return rows


def apart(case: Case, folder: pathlib.Path) -> Row:
    """`measure` in a separate process, free of other cases' compilers and constants."""
    if not topology.parse(case.topology).has_compiler:
        return {"fault": f"no compiler here: pip install 'jlora[{topology.parse(case.topology).extra}]'"}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, case, folder).result()
        except (UserError, RuntimeError) as error:  # also JAX's errors, and a process that ended early
            return {"fault": f"{type(error).__name__}: {error}".strip().splitlines()[0]}


def measure(case: Case, folder: pathlib.Path) -> Row:
    """What the case needs. Sets jlora's constants and does not restore them."""
    if case.plain_attention:
        kernels.attention.PLAIN["gpu"] = math.inf
    if case.whole_mlp:
        decoder.TILE = 1 << 62
    began = time.process_time()
    found = forecast(config_of(case, folder), topology.parse(case.topology))
    return row(case, found, time.process_time() - began)


def config_of(case: Case, folder: pathlib.Path) -> RunConfig:
    """The case's run settings, as for `jlora plan`."""
    values: Settings = {
        "model": {"path": str(folder / case.model), "quant": "nf4", "dtype": "bfloat16"},
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "data": {"path": "none"},
        "train": {"steps": 1, "batch_size": case.rows, "seq_len": case.tokens, "remat": "full"},
    }
    for own in case.settings:
        values |= {group: changed and values.get(group, {}) | changed for group, changed in own.items()}
    return resolve(values)


def row(case: Case, found: Forecast, cpu_seconds: float) -> Row:
    """The case's figures (in GiB), and the aims that it misses."""
    sizes = dict(
        peak=found.peak_bytes_per_device,
        arguments=found.argument_bytes,
        temporaries=found.peak_bytes_per_device - found.argument_bytes,
        host=found.host_bytes,
        received=sum(found.received_bytes.values()),
    )
    figures = {name: round(size / GIB, 3) for name, size in sizes.items()} | {"cpu_seconds": round(cpu_seconds, 1)}
    aims = {name: most for name, most in case.aim._asdict().items() if most is not None}
    missed = [name for name, most in aims.items() if figures[name] > most]
    made = dict(date=datetime.date.today().isoformat(), commit=record.commit())
    return figures | {"aim": aims, "missed": missed, "peer": case.peer} | made


def kept(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows, with those of earlier runs for cases without new figures; cases that no longer exist are dropped."""
    path = record.RESULTS / f"{NAME}.json"
    earlier = json.loads(path.read_text())["figures"]["cases"] if path.exists() else {}
    known = earlier | {name: found for name, found in rows.items() if "fault" not in found}
    return {case.name: known[case.name] for case in CASES if case.name in known}


def _table(cases: Iterable[Case], rows: dict[str, Row]) -> rich.table.Table:
    columns = ("peak", "arguments", "temporaries", "host", "received", "CPU s")
    table = rich.table.Table(
        "case",
        *(rich.table.Column(name, justify="right") for name in columns),
        "aim",
        "others",
        caption="GiB a device, and CPU seconds of tracing and compiling; ✗: an aim is missed",
    )
    for case in cases:
        found = rows[case.name]
        if fault := found.get("fault"):
            table.add_row(case.name, *[""] * len(columns), fault, case.peer)
            continue
        sizes = [f"{found[name]:.2f}" for name in ("peak", "arguments", "temporaries", "host", "received")]
        aims = [
            f"{name.replace('_', ' ')} ≤ {most:g}{' ✗' if name in found['missed'] else ''}"
            for name, most in found["aim"].items()
        ]
        table.add_row(case.name, *sizes, f"{found['cpu_seconds']:.0f}", ", ".join(aims), case.peer)
    return table


def _write_models(folder: pathlib.Path) -> pathlib.Path:
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def _wanted(only: str | None, names: list[str] | None) -> list[Case]:
    return [case for case in CASES if only in (None, case.group) and (names is None or case.name in names)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("h100", "tpu"), help="the cases of one compiler")
    parser.add_argument("--cases", type=_names, metavar="NAME,NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument("--dry", action="store_true", help="a tiny model on this machine's CPU; nothing is written")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    known, found = [case.name for case in CASES], text.split(",")
    if unknown := [name for name in found if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return found


if __name__ == "__main__":
    main()
