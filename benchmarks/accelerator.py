#!/usr/bin/env python3
"""jlora on one accelerator: are its numbers a CPU's, and how fast and large are training, decoding and kernels?

    python benchmarks/accelerator.py [--minutes 9] [--parts checks,train,attention,decode,kernels,peft] [--out FILE]
    python benchmarks/accelerator.py --dry          # all of it, tiny, on the CPU

Nothing is downloaded: weights are random. Every measurement runs in its own process, so that it has its own peak memory
and a failure costs one row. Rows are saved as they come; what does not fit into `--minutes` is left out and named. The
checks of device_checks.py come first. Training uses Qwen 3's shapes, r=16 on all linears, 2 × 2048 tokens × 4
micro-batches, four documents packed in a row, AdamW, and recomputes every layer. Every speed comes with the loss and
the gradient norm, every peak with what `jlora plan` expects of such a device. MFU is defined in
jlora/train/reporting/usage.py.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from device_checks import ACCUMULATION, BATCH, TINY, Row, checks, lookups, numbers, packed_batch

QWEN3 = TINY | dict(vocab_size=151936, head_dim=128)
SHAPES = {
    "tiny": TINY,
    "0.6b": QWEN3 | dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "4b": QWEN3 | dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "8b": QWEN3 | dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32)
    | dict(tie_word_embeddings=False),
}  # fmt: skip
LENGTH, RANK = 2048, 16
PARTS_BY_DEFAULT = "checks,train,attention,decode,kernels,peft"
# Seconds for all checks, and seconds after which a part counts as hung.
CHECKS, LONGEST = 90, 150


def measurements(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, settings for its process), the most important first."""
    big, *others = ("tiny",) if options.dry else ("8b", "0.6b", "4b")
    formats = ("nf4", "bfloat16")
    every: list[tuple[str, dict[str, Any]]] = [("checks", {"dry": options.dry})]
    every += [("train", {"shape": big, "format": format}) for format in formats]
    every += [("attention", {"dry": options.dry})]
    every += [("train", {"shape": shape, "format": format}) for shape in others for format in formats]
    every += [("decode", {"shape": big, "format": format}) for format in formats]
    every += [("peft", {"shape": big}), ("kernels", {"dry": options.dry})]
    every += [("peft", {"shape": shape}) for shape in others]
    chosen = options.parts.split(",")
    yield from ((part, settings) for part, settings in every if part in chosen)


def train(shape: str, format: str) -> Iterator[Row]:
    """Speed and peak memory of jlora's optimizer step."""
    import jax
    from packed_decoding import weights

    from jlora import lora, models, sharding
    from jlora.optim import OptimConfig, make_optimizer
    from jlora.train.algorithms.algorithm import placement
    from jlora.train.algorithms.sft import sft_loss
    from jlora.train.reporting import usage
    from jlora.train.state import create_state
    from jlora.train.step import make_step

    device = jax.devices()[0]
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        asked = beside.submit(_planned, shape, format, device.device_kind)
        model = models.build(SHAPES[shape])
        frozen, trainable = lora.split(weights(model, format, "bfloat16"))
        mesh = sharding.make_mesh(sharding.MeshConfig(), [device])
        optimizer = make_optimizer(OptimConfig(learning_rate=1e-4, schedule="constant"), 1000)
        length = _length(shape)
        flops = usage.flops_per_token(model.config, frozen, trainable, length)
        state = create_state(trainable, optimizer, 0, mesh)
        step = make_step(sft_loss(model), optimizer, placement(state))
        batch = sharding.put_batch(packed_batch(model.config.vocab_size, length), mesh)
        begun = time.perf_counter()
        compiled = step.lower(state, frozen, batch).compile()
        took = time.perf_counter() - begun
        planned = asked.result()  # so that nothing else is running while steps are timed
    before = _peak_gib()
    seconds, losses, norms = [], [], []
    for _ in range(6):
        begun = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begun)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    typical, tokens = statistics.median(seconds[1:]), ACCUMULATION * BATCH * length
    used = usage.summary(tokens, typical, flops, used=[device])
    yield {
        "tokens_per_second": used.tokens_per_second,
        "mfu": used.mfu,
        "loss": losses,
        "grad_norm": norms,
        "peak_gib": _peak_gib(),
        "peak_before_steps_gib": before,
        "compiled_gib": getattr(compiled.memory_analysis(), "peak_memory_in_bytes", 0) / 2**30,
        **planned,
        "compile_seconds": took,
        "frozen_gib": sum(leaf.nbytes for leaf in jax.tree.leaves(frozen)) / 2**30,
        "passed": bool(np.isfinite(losses + norms).all()),
    }


def _length(shape: str) -> int:
    return LENGTH if shape != "tiny" else 64


def _planned(shape: str, format: str, kind: str) -> Row:
    """What `jlora plan` expects of such a device, from a process that does not use the accelerator."""
    settings = {"shape": shape, "format": format, "kind": kind}
    row = list(rows_of([("plan", settings)], platform="cpu", limit=100))[-1]
    return {name.replace("error", "plan_error"): row[name] for name in row if name not in settings and name != "part"}


def plan(shape: str, format: str, kind: str) -> Iterator[Row]:
    """The memory that `jlora plan` expects."""
    from jlora import devices
    from jlora.train.config import resolve
    from jlora.train.planning.forecast import forecast
    from jlora.train.planning.topology import parse

    device = devices.known(kind)
    if device is None:
        yield {"plan_note": f"jlora plan does not know {kind}"}
        return
    with tempfile.TemporaryDirectory() as folder:
        description = SHAPES[shape] | {"architectures": ["Qwen3ForCausalLM"]}
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(description))
        settings = {
            "algorithm": "sft",
            "model": {"path": folder, "dtype": "bfloat16", "quant": format if format == "nf4" else None},
            "data": {"path": "none.jsonl"},  # never read
            "lora": {"r": RANK, "target_modules": "all-linear"},
            "train": {"steps": 1, "batch_size": BATCH, "grad_accum": ACCUMULATION, "seq_len": _length(shape)},
        }
        found = forecast(resolve(settings), parse(device.name))
    yield {
        "plan_gib": found.peak_bytes_per_device / 2**30,
        "plan_is_estimate": found.estimated,
        "plan_least_seconds": found.seconds_per_step,
    }


def _peak_gib() -> float | None:
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def decode(shape: str, format: str) -> Iterator[Row]:
    """Tokens per second of greedy decoding with 1 and 64 rows, and with a different adapter in each of 64 rows."""
    import jax
    import jax.numpy as jnp
    from multi_adapter import adapter
    from packed_decoding import weights

    from jlora import lora, models
    from jlora.generate import decode as run
    from jlora.lora import Bank

    model = models.build(SHAPES[shape])
    params = weights(model, format, "bfloat16")
    prompt, new = (64, 65) if shape != "tiny" else (8, 5)

    def speed(params: Any, rows: int, places: Any = None) -> float:
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 500, (rows, prompt)), jnp.int32)
        lengths, keys = jnp.full(rows, prompt, jnp.int32), jax.random.split(jax.random.key(0), rows)
        settings = dict(rows=rows, stop_ids=(), greedy=True, adapters=places)

        def once(count: int) -> float:
            begun = time.perf_counter()
            run(model, params, tokens, lengths, keys, max_new_tokens=count, **settings).tokens.block_until_ready()
            return time.perf_counter() - begun

        once(1), once(new)
        return rows * (new - 1) / statistics.median(once(new) - once(1) for _ in range(3))

    for rows in (1, 64):
        yield {"rows": rows, "tokens_per_second": speed(params, rows), "peak_gib": _peak_gib()}
    base = lora.strip(params)
    del params
    bank = Bank.of(base, {str(i): adapter(base, "q_proj,v_proj:8", i) for i in range(64)})
    many = speed(bank.params, 64, bank.places(list(map(str, range(64)))))
    yield {"rows": 64, "adapters": 64, "tokens_per_second": many, "peak_gib": _peak_gib()}


class Timer:
    """Times programs, in milliseconds per call."""

    def __init__(self, dry: bool) -> None:
        self._rounds, self._calls = (1, 1) if dry else (10, 3)

    def __call__(self, function: Callable, *arguments: Any) -> Row:
        """The median time and the temporary memory; a note if the function does not run on this device."""
        import jax

        try:
            compiled = jax.jit(function).lower(*arguments).compile()
            jax.block_until_ready(compiled(*arguments))
            seconds = []
            for _ in range(self._rounds):
                begun = time.perf_counter()
                jax.block_until_ready([compiled(*arguments) for _ in range(self._calls)])
                seconds.append((time.perf_counter() - begun) / self._calls)
            temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
            return {"milliseconds": statistics.median(seconds) * 1e3, "temporary_gib": temporary / 2**30}
        except Exception as error:  # noqa: BLE001 (a kernel that does not run is a row that says why)
            return {"note": f"{type(error).__name__}: {error}"[:200]}


def forward_and_back(function: Callable, of: int | None = None) -> Callable:
    """A function that computes the values and the gradients for the first `of` arguments (None: for all)."""
    import jax
    import jax.numpy as jnp

    def run(*arguments: Any) -> Any:
        inner, outer = arguments[:of], arguments[len(arguments[:of]) :]
        y, pullback = jax.vjp(lambda *x: function(*x, *outer), *inner)
        return y, pullback(jnp.ones_like(y))

    return run


def attention(dry: bool = False) -> Iterator[Row]:
    """Times every form of attention that can run here, and the device's libraries, in Qwen3-8B's sizes.

    The basis of the table BEST in jlora/kernels/attention. Rows have one document each: the libraries' masks allow only
    that.
    """
    import jax
    import jax.numpy as jnp
    from device_checks import forms_here

    from jlora.kernels.attention import Marks, attend

    heads, kv_heads, width = (4, 2, 16) if dry else (32, 8, 128)
    timed = Timer(dry)
    for rows, tokens in ((2, 64), (1, 256)) if dry else ((2, 2048), (1, 8192), (2, 512)):
        shapes = (rows, tokens, heads, width), (rows, tokens, kv_heads, width), (rows, tokens, kv_heads, width)
        inputs = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
        own = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens)), jnp.ones((rows, tokens), jnp.int32)
        marks = Marks(*own, *own, branches=False)
        forms: dict[str, Callable] = {
            name: functools.partial(attend, marks=marks, scale=width**-0.5, form=name) for name in forms_here()
        }
        for name in ("cudnn", "xla"):
            library = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=name)
            forms[f"jax.nn, {name}"] = library
        for form, function in forms.items():
            both = timed(forward_and_back(function), *inputs)
            forward = timed(function, *inputs).get("milliseconds") if "milliseconds" in both else None
            yield {"form": form, "size": f"{rows}×{tokens}", "forward_milliseconds": forward, **both}


def kernels(dry: bool = False) -> Iterator[Row]:
    """Times the step's other parts in Qwen3-8B's sizes."""
    import jax
    import jax.numpy as jnp

    from jlora import quant
    from jlora.losses import cross_entropy
    from jlora.quant.lookups import FORMS
    from jlora.quant.products import matmul

    scale = 32 if dry else 1
    width, inner, length, vocabulary = (size // scale for size in (4096, 12288, LENGTH, 151936))
    draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    key = jax.random.key(0)
    x, dense = draw(key, (BATCH * length, width)), draw(key, (width, inner)) * 0.02
    timed, product = Timer(dry), forward_and_back(matmul, 1)
    yield {"kernel": "product, dense"} | timed(product, x, dense)
    for name in FORMS:
        with lookups(name):
            for nested in (True, False):
                packed = quant.quantize(dense, "nf4", double_quant=nested)
                label = f"nf4, {name}{', nested' if nested else ''}"
                values = timed(lambda leaf: quant.dequantize(leaf, jnp.bfloat16), packed)
                yield {"kernel": f"dequantise, {label}"} | values
                yield {"kernel": f"product, {label}"} | timed(product, x, packed)
    yield {"kernel": "product, int8"} | timed(product, x, quant.quantize(dense, "int8"))

    head = {"kernel": draw(key, (width, vocabulary)) * 0.02}
    hidden = draw(key, (BATCH, length, width))
    targets, counted = jnp.zeros((BATCH, length), jnp.int32), jnp.ones((BATCH, length), jnp.float32)
    for chunk in (512, 2048, BATCH * length):

        def loss(hidden: jax.Array, chunk: int = chunk) -> jax.Array:
            project = lambda head, h: (h @ head["kernel"]).astype(jnp.float32)  # noqa: E731
            return cross_entropy(project, head, hidden, targets, counted, chunk=chunk).loss

        yield {"kernel": f"loss, chunks of {chunk}"} | timed(jax.value_and_grad(loss), hidden)


def peft(shape: str) -> Iterator[Row]:
    """Speed and peak memory of PEFT's LoRA step in bfloat16 with recomputed layers, on a GPU if torch finds one."""
    import peft as library
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = {name: value for name, value in SHAPES[shape].items() if name not in ("model_type", "rope_theta")}
    config = transformers.Qwen3Config(**names, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    with torch.device(device):
        model = transformers.Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    settings = library.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = library.get_peft_model(model, settings).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=device == "cuda")
    length = _length(shape)
    ids = torch.from_numpy(packed_batch(config.vocab_size, length)["tokens"].astype(np.int64)).to(device)
    seconds, losses = [], []
    for _ in range(6):
        begun = time.perf_counter()
        optimizer.zero_grad()
        total = 0.0
        for rows in ids:
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=rows, labels=rows).loss / ACCUMULATION
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(total))
        seconds.append(time.perf_counter() - begun)
    yield {
        "tokens_per_second": ACCUMULATION * BATCH * length / statistics.median(seconds[1:]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "loss": losses,
    }


def checked(dry: bool = False) -> Iterator[Row]:
    """Every check, with a CPU's numbers from a second process."""
    seconds = CHECKS if not dry else 10 * CHECKS
    come: queue.Queue[Row] = queue.Queue()
    known: dict[str, Any] = {}

    def listen() -> None:
        for row in rows_of([("numbers", {"dry": dry})], platform="cpu", limit=seconds):
            come.put(row)
        come.put({})

    def theirs(name: str) -> Any:
        while name not in known:
            if "name" not in (row := come.get()):
                come.put({})  # the next one that waits will not get more either
                break
            known[row["name"]] = row["value"]
        return known.get(name)

    threading.Thread(target=listen).start()
    yield from checks(theirs, seconds, dry)


def told(dry: bool = False) -> Iterator[Row]:
    """A row for each of the `numbers` that checks compare."""
    for name, compute in numbers(dry):
        yield {"name": name, "value": compute()}


PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "checks": checked,
    "numbers": told,
    "train": train,
    "plan": plan,
    "attention": attention,
    "kernels": kernels,
    "decode": decode,
    "peft": peft,
}


def work(asked: list[tuple[str, dict[str, Any]]]) -> None:
    """Prints each row of the given parts as a line of JSON."""
    for part, settings in asked:
        try:
            for row in PARTS[part](**settings):
                print(json.dumps({"part": part, **settings, **row}), flush=True)
        except Exception as error:  # noqa: BLE001 (a failure costs one row; the next part still runs)
            print(
                json.dumps({"part": part, **settings, "error": f"{type(error).__name__}: {error}"[:1500]}), flush=True
            )


def rows_of(
    asked: list[tuple[str, dict[str, Any]]], *, platform: str | None = None, limit: float
) -> Iterator[dict[str, Any]]:
    """The rows of parts, as they come, from a separate process.

    A last one has an "error" if the process fails or takes longer than `limit` seconds.
    """
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    environment = os.environ | ({"JAX_PLATFORMS": platform} if platform else {})
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith('{"part"'):
                    yield json.loads(line)
        finally:
            timer.cancel()
            process.kill() if process.poll() is None and late.is_set() else None
            code = process.wait()
        if code:
            said.seek(0)
            why = f"took longer than {limit:.0f} s" if late.is_set() else said.read()[-1500:] or f"ended with {code}"
            part, settings = asked[0]
            yield {"part": part, **settings, "error": why}


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every row; a part without enough time left is a row with a note."""
    until = time.monotonic() + 60 * options.minutes
    every = list(measurements(options))
    # Tiny measurements share a process, because starting it takes most of their time.
    for asked in [every] if options.dry else [[one] for one in every]:
        left = until - time.monotonic()
        if left < 5:
            yield from ({"part": part, **settings, "note": "left out: no time left"} for part, settings in asked)
            continue
        for row in rows_of(asked, limit=left if options.dry else min(left, LONGEST)):
            if "error" in row and time.monotonic() > until - 1:
                row = {name: value for name, value in row.items() if name != "error"} | {
                    "note": "cut off: no time left"
                }
            yield row


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of a table of attention's milliseconds, forward and backward, by form and size."""
    rows = [row for row in found if row["part"] == "attention" and "form" in row]
    sizes, forms = (list(dict.fromkeys(row[name] for row in rows)) for name in ("size", "form"))
    if rows:
        yield f"{'attention, ms':<16}" + "".join(f"{size:>12}" for size in sizes)
    for form in forms:
        times = {row["size"]: row.get("milliseconds") for row in rows if row["form"] == form}
        cells = (f"{times[size]:12.3f}" if times.get(size) else f"{'-':>12}" for size in sizes)
        yield f"{form:<16}" + "".join(cells)


def main() -> None:
    """Prints every row as a line, and saves all of them as JSON in results/ (or in --out) as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after these (default %(default)s)")
    parser.add_argument("--parts", default=PARTS_BY_DEFAULT, help="default: %(default)s")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU; keeps nothing but --out")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.json", help="keep the figures there")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work(options.child)
        return
    if options.dry:  # programs run once, and LLVM would spend most of the time optimising them
        flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
        os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if unknown := set(options.parts.split(",")) - set(PARTS_BY_DEFAULT.split(",")):
        parser.error(f"--parts: found {', '.join(sorted(unknown))}; expected some of {PARTS_BY_DEFAULT}")
    import record

    device = _device() if not options.dry else "cpu"
    found: list[dict[str, Any]] = []
    for row in measured(options):
        found.append(row)
        print(json.dumps(row), flush=True)
        if options.out or not options.dry:
            figures = {"minutes": options.minutes, "rows": found}
            record.save("accelerator", figures, device=device, path=options.out)
    print("\n".join(table(found)))
    failed = [row for row in found if "error" in row or row.get("passed") is False]
    noted = [row for row in found if row.get("note", "").startswith(("left out", "cut off"))]
    for row in failed:
        print(f"FAILED: {json.dumps(row)[:300]}")
    print(f"{len(found) - len(failed) - len(noted)} rows, {len(failed)} failed, {len(noted)} left out")
    sys.exit(1 if failed else 0)


def _device() -> str:
    """The accelerator's kind, from another process, because a process that asks reserves most of its memory."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
