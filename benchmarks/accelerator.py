#!/usr/bin/env python3
"""What jlora does on one accelerator: the same numbers as on a CPU, speed and memory of training, decoding, kernels.

    python benchmarks/accelerator.py [--minutes 9] [--parts checks,train,kernels,decode,peft] [--out FILE.json]
    python benchmarks/accelerator.py --dry          # all of it, tiny, on the CPU

Nothing is downloaded: weights are random. Every measurement has a process of its own, so that its peak memory is its
own and one that fails is one row; what no longer fits into `--minutes` is left out and named. Training is Qwen 3's
shapes, r=16 on all linears, 2 × 2048 tokens × 4 micro-batches, four documents packed in a row, AdamW, every layer
recomputed; the loss and the gradient's norm stand beside every speed. MFU counts what the mathematics needs and not
what is recomputed: 4 operations for each matrix weight and token (frozen weights have no gradient) and attention's six
products (of half a square), over the device's dense bfloat16 peak.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

PEAK_TFLOPS = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100-SXM4-80GB": 312}
QWEN3 = dict(model_type="qwen3", vocab_size=151936, head_dim=128, num_key_value_heads=8, rms_norm_eps=1e-6)
QWEN3 |= dict(hidden_act="silu", max_position_embeddings=40960, rope_theta=1e6)
SHAPES = {
    "tiny": QWEN3 | dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    | dict(num_attention_heads=8, tie_word_embeddings=True),
    "0.6b": QWEN3 | dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28)
    | dict(num_attention_heads=16, tie_word_embeddings=True),
    "4b": QWEN3 | dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36)
    | dict(num_attention_heads=32, tie_word_embeddings=True),
    "8b": QWEN3 | dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36)
    | dict(num_attention_heads=32, tie_word_embeddings=False),
}  # fmt: skip
BATCH, LENGTH, ACCUMULATION, DOCUMENTS, RANK = 2, 2048, 4, 4, 16
ALGORITHMS = ("sft", "dpo", "cpo", "orpo", "kto", "reward", "grpo", "ppo")
RELATIVE = 1e-3  # between devices, in float32 and with products in full precision


def measurements(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, what its process is told), what matters most first."""
    shapes = ("tiny",) if options.dry else ("8b", "0.6b", "4b")
    every: list[tuple[str, dict[str, Any]]] = [("checks", {})]
    every += [("train", {"shape": shape, "format": format}) for shape in shapes for format in ("nf4", "bfloat16")]
    every += [("peft", {"shape": shape}) for shape in shapes]
    every += [("kernels", {"dry": options.dry})]
    every += [("decode", {"shape": shapes[0], "format": format}) for format in ("bfloat16", "nf4")]
    every += [("train", {"shape": shapes[0], "format": "nf4", "lookup": "select"})]
    chosen = options.parts.split(",")
    yield from ((part, settings) for part, settings in every if part in chosen)


def packed_batch(vocabulary: int, length: int) -> dict[str, np.ndarray]:
    """A step's arrays [A, B, T]: every row is four documents, every token is trained."""
    shape = (ACCUMULATION, BATCH, length)
    ids = np.random.default_rng(0).integers(0, vocabulary, shape).astype(np.int32)
    place = np.arange(length, dtype=np.int32)
    part = length // DOCUMENTS
    return {
        "tokens": ids,
        "targets": np.roll(ids, -1, axis=2),
        "weights": np.ones(shape, np.float32),
        "positions": np.broadcast_to(place % part, shape).astype(np.int32),
        "segment_ids": np.broadcast_to(1 + place // part, shape).astype(np.int32),
    }


def train(shape: str, format: str, lookup: str | None = None) -> dict[str, Any]:
    """Speed and peak memory of jlora's optimizer step."""
    import jax
    import jax.numpy as jnp
    from packed_decoding import weights

    from jlora import lora, models, sharding
    from jlora.optim import OptimConfig, make_optimizer
    from jlora.quant import four_bit
    from jlora.train.algorithm import placement
    from jlora.train.sft import sft_loss
    from jlora.train.state import create_state
    from jlora.train.step import make_step

    if lookup:
        four_bit.LOOKUP.update(default=lookup)
    model = models.build(SHAPES[shape])
    frozen, trainable = lora.split(weights(model, format, "bfloat16"))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-4, schedule="constant"), 1000)
    state = create_state(trainable, optimizer, 0, mesh)
    step = make_step(sft_loss(model), optimizer, placement(state))
    length = LENGTH if shape != "tiny" else 64
    batch = sharding.put_batch(packed_batch(model.config.vocab_size, length), mesh)
    begun = time.perf_counter()
    compiled = step.lower(state, frozen, batch).compile()
    took = time.perf_counter() - begun
    planned = compiled.memory_analysis()
    seconds, losses, norms = [], [], []
    for _ in range(6):
        begun = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begun)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    typical = statistics.median(seconds[1:])
    tokens = ACCUMULATION * BATCH * length
    return {
        "tokens_per_second": tokens / typical,
        "mfu": _mfu(model.config, tokens / typical, length // DOCUMENTS, jax.devices()[0].device_kind),
        "peak_gib": _peak_gib(),
        "compiled_gib": getattr(planned, "peak_memory_in_bytes", 0) / 2**30,
        "compile_seconds": took,
        "loss": losses,
        "grad_norm": norms,
        "frozen_gib": sum(leaf.nbytes for leaf in jax.tree.leaves(frozen)) / 2**30,
        "finite": bool(jnp.isfinite(jnp.asarray(losses + norms)).all()),
    }


def _mfu(config: Any, tokens_per_second: float, document: int, device: str) -> float | None:
    """Model operations over the device's peak; None where that is not known."""
    if device not in PEAK_TFLOPS:
        return None
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = 2 * width * heads + 2 * width * keys + 3 * width * config.intermediate_size
    matrices = config.num_hidden_layers * layer + config.vocab_size * width
    # Two products forward and four backward, over half of a document on average.
    attention = config.num_hidden_layers * 6 * 2 * heads * document / 2
    return tokens_per_second * (4 * matrices + attention) / (PEAK_TFLOPS[device] * 1e12)


def _peak_gib() -> float | None:
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def decode(shape: str, format: str) -> dict[str, Any]:
    """Tokens a second of greedy decoding at 1 and 64 rows, and with an adapter of its own in each of 64 rows."""
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

    found = {"rows_1": speed(params, 1), "rows_64": speed(params, 64), "peak_gib": _peak_gib()}
    base = lora.strip(params)
    del params
    bank = Bank.of(base, {str(i): adapter(base, "q_proj,v_proj:8", i) for i in range(64)})
    found["rows_64_adapters_64"] = speed(bank.params, 64, bank.places(list(map(str, range(64)))))
    return found


def kernels(dry: bool = False) -> dict[str, Any]:
    """Milliseconds of the step's parts in Qwen3-8B's sizes, as jlora has them and as the device's library has them."""
    import jax
    import jax.numpy as jnp

    from jlora import quant
    from jlora.losses import cross_entropy
    from jlora.models.attention import attend, attention_mask
    from jlora.quant import four_bit
    from jlora.quant.matmul import matmul

    scale = 32 if dry else 1
    width, inner, heads, keys, length = 4096 // scale, 12288 // scale, 32 // min(scale, 4), 8 // min(scale, 4), 2048
    length, vocabulary = length // scale, 151936 // scale
    draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    key = jax.random.key(0)
    x, dense = draw(key, (BATCH * length, width)), draw(key, (width, inner)) * 0.02
    found: dict[str, Any] = {}

    def timed(name: str, function: Callable, *arguments: Any) -> None:
        jitted = jax.jit(function)
        try:
            jax.block_until_ready(jitted(*arguments))
            seconds = []
            for _ in range(10):
                begun = time.perf_counter()
                jax.block_until_ready([jitted(*arguments) for _ in range(3)])
                seconds.append((time.perf_counter() - begun) / 3)
            found[name] = statistics.median(seconds) * 1e3
        except Exception as error:  # noqa: BLE001 (a form that does not run on this device is a result of its own)
            found[name] = f"{type(error).__name__}: {error}"[:200]

    def forward_and_back(function: Callable) -> Callable:
        def run(x: jax.Array, *others: Any) -> Any:
            y, pullback = jax.vjp(lambda x: function(x, *others), x)
            return y, pullback(jnp.ones_like(y))

        return run

    def of_all(function: Callable) -> Callable:
        def run(*arguments: jax.Array) -> Any:
            y, pullback = jax.vjp(function, *arguments)
            return y, pullback(jnp.ones_like(y))

        return run

    timed("product, dense", forward_and_back(matmul), x, dense)
    for name in four_bit.LOOKUPS:
        four_bit.LOOKUP.update(default=name, cpu=name)
        jax.clear_caches()
        for nested in (True, False):
            packed = quant.quantize(dense, "nf4", double_quant=nested)
            label = f"nf4, {name}{', nested' if nested else ''}"
            timed(f"dequantise, {label}", lambda leaf: quant.dequantize(leaf, jnp.bfloat16), packed)
            timed(f"product, {label}", forward_and_back(matmul), x, packed)
    timed("product, int8", forward_and_back(matmul), x, quant.quantize(dense, "int8"))

    for rows, tokens in ((BATCH, length), (1, 4 * length)):
        q = draw(key, (rows, tokens, heads, 128))
        k = v = draw(key, (rows, tokens, keys, 128))
        place = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens))
        mask = attention_mask(place, jnp.ones_like(place), place, jnp.ones_like(place))

        timed(f"attention, jlora, {rows}×{tokens}", of_all(functools.partial(attend, mask=mask)), q, k, v)
        for form in ("cudnn", "xla"):
            library = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=form)
            timed(f"attention, {form}, {rows}×{tokens}", of_all(library), q, k, v)

    head = {"kernel": draw(key, (width, vocabulary)) * 0.02}
    hidden = draw(key, (BATCH, length, width))
    targets, counted = jnp.zeros((BATCH, length), jnp.int32), jnp.ones((BATCH, length), jnp.float32)
    for chunk in (512, 2048, BATCH * length):

        def loss(hidden: jax.Array, chunk: int = chunk) -> jax.Array:
            project = lambda head, h: (h @ head["kernel"]).astype(jnp.float32)  # noqa: E731
            return cross_entropy(project, head, hidden, targets, counted, chunk=chunk).loss

        timed(f"loss, chunks of {chunk}", jax.value_and_grad(loss), hidden)
    return {"milliseconds": found}


def peft(shape: str) -> dict[str, Any]:
    """Speed and peak memory of PEFT's LoRA step in bfloat16 with recomputed layers, where torch finds a GPU."""
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
    length = LENGTH if shape != "tiny" else 64
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
    return {
        "tokens_per_second": ACCUMULATION * BATCH * length / statistics.median(seconds[1:]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "loss": losses,
    }


def numbers() -> dict[str, Any]:
    """What every device must agree on: packing to the bit, and in float32 logits and a tiny run of each algorithm."""
    import jax
    import jax.numpy as jnp

    from jlora import lora, models, quant, tree

    jax.config.update("jax_default_matmul_precision", "highest")
    kernel = np.random.default_rng(0).standard_t(5, (3, 192, 96)).astype(np.float32) * 0.05
    found: dict[str, Any] = {}
    for format in quant.FORMATS:
        leaf = quant.quantize(jnp.asarray(kernel), format)
        for name, part in (("packed", leaf), ("values", quant.dequantize(leaf, jnp.float32))):
            parts = b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(part))
            found[f"{format} {name}, bits"] = hashlib.sha256(parts).hexdigest()[:16]
    model = models.build(SHAPES["tiny"])
    params = drawn(model)
    config = quant.as_config("nf4")
    params = tree.map_with_path(
        lambda path, leaf: quant.quantize(leaf) if quant.leaf_format(path, config) else leaf, params
    )
    params = lora.init(params, lora.LoraConfig(r=4), jax.random.key(1))
    batch = {name: rows[0] for name, rows in packed_batch(512, 64).items()}
    logits = model(params, batch["tokens"], batch["positions"], batch["segment_ids"])
    found["logits"] = np.asarray(logits[:, ::16, ::64]).ravel().tolist()
    with tempfile.TemporaryDirectory() as folder:
        for algorithm in ALGORITHMS:
            found[algorithm] = tiny_run(pathlib.Path(folder), algorithm)
    return found


def drawn(model: Any) -> dict[str, Any]:
    """Random float32 params that are the same to the bit on every device, as JAX's own normal numbers are not."""
    from jlora import tree

    generator = np.random.default_rng(0)
    leaves = tree.flatten(model.abstract_params())
    draw = {path: generator.standard_normal(leaf.shape, np.float32) * 0.1 for path, leaf in leaves.items()}
    return tree.unflatten({path: value + path.endswith("scale") for path, value in draw.items()})


def tiny_run(folder: pathlib.Path, algorithm: str) -> list[float]:
    """The losses and gradient norms of two steps in float32."""
    from jlora.train import resolve, run
    from jlora.train.metrics import read_metrics

    rollouts = algorithm in ("grpo", "ppo")
    settings = {
        "algorithm": algorithm,
        "model": {"path": str(_model(folder)), "dtype": "float32", "quant": "nf4"},
        "data": {"path": str(_data(folder, algorithm)), "bucket": 16},
        "lora": {"r": 4},
        "optim": {"learning_rate": 1e-3, "schedule": "constant"},
        "train": {"steps": 2, "batch_size": 4, "seq_len": 64},
    }
    if rollouts:
        rewards = folder / "rewards.py"
        rewards.write_text("def length(completions, **_):\n    return [len(text) / 8.0 for text in completions]\n")
        settings["rollout"] = {"rewards": (f"{rewards}:length",), "max_completion_length": 8, "num_generations": 2}
        settings["rollout"]["rows"] = 4
    run(resolve(settings), folder / algorithm)
    rows = read_metrics(folder / algorithm)
    return [float(row[name]) for row in rows if "loss" in row for name in ("loss", "grad_norm")]


def _model(folder: pathlib.Path) -> pathlib.Path:
    """A folder with a tiny random model and a tokenizer of bytes."""
    import tokenizers
    import transformers

    import jlora
    from jlora import models

    path = folder / "model"
    if not path.exists():
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(
            tokenizers.models.BPE({symbol: index for index, symbol in enumerate(["<|end|>", *alphabet])}, [])
        )
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(["<|end|>"])
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
        model = models.build(SHAPES["tiny"])
        jlora.save_model(path, model, drawn(model), tokenizer=tokenizer)
    return path


def _data(folder: pathlib.Path, algorithm: str) -> pathlib.Path:
    """Eight records of what the algorithm learns from."""
    records = [{"prompt": f"question {i} "} for i in range(8)]
    if algorithm == "sft":
        records = [record | {"completion": f"answer {i}"} for i, record in enumerate(records)]
    elif algorithm not in ("grpo", "ppo"):
        records = [record | {"chosen": f"good {i}", "rejected": f"bad {7 * i}"} for i, record in enumerate(records)]
    path = folder / f"{algorithm}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def checks() -> dict[str, Any]:
    """Where this device's numbers differ from a CPU's: what is not equal to the bit, and by how much the others are."""
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(child, "numbers", {}, platform="cpu", limit=400)
        ours = numbers()
        theirs = waiting.result()
    differences: dict[str, Any] = {}
    for name, value in ours.items():
        other = theirs.get(name)
        if isinstance(value, str):
            differences[name] = "equal" if value == other else "different"
        else:
            one, two = np.asarray(value), np.asarray(other)
            differences[name] = float(np.max(np.abs(one - two)) / max(float(np.max(np.abs(two))), 1e-30))
    wrong = [name for name, value in differences.items() if value != "equal" and not (_number(value) < RELATIVE)]
    return {"against_cpu": differences, "wrong": wrong}


def _number(value: Any) -> float:
    return value if isinstance(value, float) else float("inf")


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "checks": checks,
    "numbers": numbers,
    "train": train,
    "kernels": kernels,
    "decode": decode,
    "peft": peft,
}


def child(part: str, settings: dict[str, Any], *, platform: str | None = None, limit: float) -> dict[str, Any]:
    """What a part gives in a process of its own; {"error": …} where it fails or takes longer than `limit` seconds."""
    command = [sys.executable, __file__, "--child", part, "--settings", json.dumps(settings)]
    environment = os.environ | ({"JAX_PLATFORMS": platform} if platform else {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit:.0f} s"}
    if done.returncode:
        return {"error": done.stderr[-1500:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Every measurement as a line, and all of them as JSON in results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing after these (default %(default)s)")
    parser.add_argument("--parts", default="checks,train,kernels,decode,peft", help="default: %(default)s")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU; keeps nothing")
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FILE.json", help="also keep the figures there, as they come"
    )
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(PARTS[options.child](**options.settings)))
        return
    if options.dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
    until = time.monotonic() + 60 * options.minutes
    found = []
    for part, settings in measurements(options):
        left = until - time.monotonic()
        result = child(part, settings, limit=left) if left > 0 else {"error": "no time left"}
        found.append({"part": part, **settings, **result})
        print(json.dumps(found[-1]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=2) + "\n")
    failed = [row for row in found if "error" in row or row.get("wrong") or row.get("finite") is False]
    if not options.dry:
        import record

        print(f"written: {record.save('accelerator', {'minutes': options.minutes, 'rows': found})}")
    print(f"{len(found) - len(failed)} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
