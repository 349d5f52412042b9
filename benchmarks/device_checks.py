"""What must hold on a device before its speed means anything: each check is a row, passed or not, with its seconds.

A part of benchmarks/accelerator.py. Forms of attention are compared with the plain one, lookups with each other, steps
with offloading with steps without; packing, logits and tiny runs of the algorithms with those of a CPU process.
"""

import contextlib
import functools
import hashlib
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

TINY = dict(model_type="qwen3", vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
TINY |= dict(num_attention_heads=8, num_key_value_heads=8, rms_norm_eps=1e-6, hidden_act="silu", rope_theta=1e6)
TINY |= dict(max_position_embeddings=40960, tie_word_embeddings=True)
ALGORITHMS = ("sft", "dpo", "grpo", "ppo", "kto", "reward", "orpo", "cpo")  # those that differ most come first
BATCH, ACCUMULATION, DOCUMENTS = 2, 4, 4
RELATIVE = 1e-3  # tolerance between devices, in float32 with products in full precision
# Tolerances of attention's values and gradients, relative to the largest: bfloat16 rounds weights and outputs.
CLOSE = {"float32": 2e-4, "bfloat16": 2e-2}
Row = dict[str, Any]


def packed_batch(vocabulary: int, length: int) -> dict[str, np.ndarray]:
    """A step's arrays [A, B, T]: every row has four documents, and every token is trained."""
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


def checks(theirs: Callable[[str], Any], seconds: float, dry: bool = False) -> Iterator[Row]:
    """A row for each check; checks without enough time left are named.

    Args:
        theirs: waits for and returns the result of `numbers` on a CPU by its name; None if it has none.
        seconds: time for all checks.
    """
    until = time.monotonic() + seconds

    def as_theirs(name: str, ours: Callable[[], Any]) -> Row:
        return compared(ours(), theirs(name))

    every = [*lookup_checks(), ("remat, offload as full", offloaded), *attention_checks(dry)]
    every += [(name, functools.partial(as_theirs, name, ours)) for name, ours in numbers(dry)]
    for name, check in every:
        begun = time.monotonic()
        if begun > until:
            yield {"check": name, "note": f"left out: checks have {seconds:.0f} s"}
            continue
        try:
            found = check()
        except Exception as error:  # noqa: BLE001 (a check that does not run has failed)
            found = {"passed": False, "why": f"{type(error).__name__}: {error}"[:300]}
        yield {"check": name, **found, "seconds": round(time.monotonic() - begun, 2)}


def compared(ours: Any, theirs: Any) -> Row:
    """A row for two results: digests (strings) must be equal, numbers close."""
    if isinstance(ours, str):
        return {"passed": ours == theirs}
    one, two = np.asarray(ours), np.asarray(theirs)
    if theirs is None or one.shape != two.shape:
        return {"passed": False, "why": f"the CPU has {str(theirs)[:200]}"}
    return _within(one, two, RELATIVE)


def _within(one: np.ndarray, two: np.ndarray, tolerance: float) -> Row:
    one, two = one.astype(np.float64), two.astype(np.float64)
    error = float(np.max(np.abs(one - two)) / max(float(np.max(np.abs(two))), 1e-30))
    return {"passed": bool(error < tolerance), "error": error}  # NaN does not pass


def forms_here() -> list[str]:
    """The forms of attention that can run on this device, including "plain".

    Not the interpreted ones, and not those for another device only.
    """
    from jlora.kernels.attention import FORMS
    from jlora.kernels.device import target

    here = (None, target())
    return [name for name, form in FORMS.items() if form.device in here and not name.endswith("_interpreted")]


def attention_checks(dry: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Compares values and gradients of every form with the plain one's in float32."""
    # More than one block of keys, and not a whole number of blocks.
    tokens = 150 if dry else 1300
    cases = ("packed", "window", "soft cap", "branches", "cache")
    for form in forms_here():
        if form != "plain":
            for dtype in CLOSE:
                for case in cases[: 1 if dry and dtype != "float32" else None]:
                    check = functools.partial(_attention, form, case, dtype, tokens, dry)
                    yield f"attention, {form}, {case}, {dtype}", check


def _attention(form: str, case: str, dtype: str, tokens: int, dry: bool) -> Row:
    import jax
    import jax.numpy as jnp

    from jlora.kernels.attention import FORMS, attend

    marks, softcap = marks_of(case, tokens)
    heads, kv_heads, width = (4, 2, 16) if dry else (8, 2, 128)
    if fault := FORMS[form].fits(marks, width):
        return {"passed": True, "note": f"not for this form: {fault}"}
    rows, (queries, size) = 2, marks.size
    shapes = [(rows, queries, heads, width), *[(rows, size, kv_heads, width)] * 2, (rows, queries, heads, width)]
    draw = np.random.default_rng(0).standard_normal
    inputs = [jnp.asarray(draw(shape, np.float32)).astype(dtype) for shape in shapes]

    def run(form: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        *inputs, grad = arrays
        y, pullback = jax.vjp(lambda *x: attend(*x, marks, width**-0.5, softcap, form), *inputs)
        return y, *pullback(grad)

    def compiled(form: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return jax.jit(functools.partial(run, form))(*arrays)

    with _small_blocks() if dry else contextlib.nullcontext():
        with jax.default_matmul_precision("highest"):
            right = compiled("plain", *(x.astype(jnp.float32) for x in inputs))
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            ours = compiled(form, *inputs)
    # Padding sees nothing, and its results are never used.
    told = np.asarray(marks.segment_ids) > 0, np.asarray(marks.key_segment_ids) > 0
    found = [
        _within(*(np.asarray(x, np.float32)[told[0 if part in (0, 1) else 1]] for x in pair), CLOSE[dtype])
        for part, pair in enumerate(zip(ours, right, strict=True))
    ]
    return {"passed": all(row["passed"] for row in found), "error": [row["error"] for row in found]}


@contextlib.contextmanager
def _small_blocks() -> Iterator[None]:
    from jlora.kernels.attention import blocked

    kept = blocked.NARROWEST, blocked.SCORES
    blocked.NARROWEST, blocked.SCORES = 32, 1
    try:
        yield
    finally:
        blocked.NARROWEST, blocked.SCORES = kept


def marks_of(case: str, tokens: int) -> tuple[Any, float | None]:
    """(Marks of two rows, soft cap) for a case: rows of two documents by default, with padding in the second row."""
    import jax.numpy as jnp

    from jlora.kernels.attention import Marks
    from jlora.types import BRANCH

    index = np.broadcast_to(np.arange(tokens), (2, tokens))
    first, second = tokens // 3, tokens // 2
    segments, positions = np.where(index < first, 1, 2), np.where(index < first, index, index - first)
    if case == "branches":
        segments = np.where(index < first, 1, np.where(index < second, 1 + BRANCH, 1 + 2 * BRANCH))
        positions = np.where(index < second, index, index - second + first)
    segments[1, -tokens // 10 :] = 0
    positions, segments = jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32)
    settings: dict[str, Any] = {"branches": case in ("branches", "cache")}
    if case == "window":
        settings |= {"windows": (None, tokens // 8), "chosen": jnp.int32(1)}
    asked = slice(second, second + tokens // 5) if case == "cache" else slice(None)
    marks = Marks(positions[:, asked], segments[:, asked], positions, segments, **settings)
    return marks, 5.0 if case == "soft cap" else None


@contextlib.contextmanager
def lookups(name: str) -> Iterator[None]:
    """Inside the context, tables of every size are looked up in this way on every platform."""
    import jax

    from jlora.quant.lookups import BEST

    kept = dict(BEST)
    BEST.update(dict.fromkeys(kept, (name, name)))
    jax.clear_caches()
    try:
        yield
    finally:
        BEST.update(kept)
        jax.clear_caches()


def lookup_checks() -> Iterator[tuple[str, Callable[[], Row]]]:
    """Checks that all lookups give the same values, to the bit."""
    from jlora.quant.four_bit import CODEBOOKS
    from jlora.quant.lookups import FORMS

    @functools.cache
    def values(name: str) -> list[str]:
        with lookups(name):
            return [_values(_packed(format, "float32")) for format in CODEBOOKS]

    def same(name: str) -> Row:
        return {"passed": values(name) == values(next(iter(FORMS)))}

    first, *others = FORMS
    for name in others:
        yield f"lookup of 4 bits and scales, {name} as {first}, bits", functools.partial(same, name)


@functools.cache
def _packed(format: str, dtype: str) -> Any:
    import jax.numpy as jnp

    from jlora import quant

    kernel = np.random.default_rng(0).standard_t(5, (3, 192, 96)).astype(np.float32) * 0.05
    return quant.quantize(jnp.asarray(kernel).astype(dtype), format)


def _values(leaf: Any) -> str:
    """The digest of a packed leaf's values in float32, which may have been rounded to fewer bits first."""
    import jax.numpy as jnp

    from jlora import quant

    return _digest(quant.dequantize(leaf, jnp.float32))


def _digest(values: Any) -> str:
    import jax

    parts = b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(values))
    return hashlib.sha256(parts).hexdigest()[:16]


def offloaded() -> Row:
    """Checks that steps with the layers' inputs offloaded to the host give the same results as steps without."""
    import jax

    from jlora import lora, models, sharding
    from jlora.optim import OptimConfig, make_optimizer
    from jlora.train.algorithms.algorithm import placement
    from jlora.train.algorithms.sft import sft_loss
    from jlora.train.state import create_state
    from jlora.train.step import make_step

    model = models.build(TINY)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2, schedule="constant"), 10)
    batch = sharding.put_batch(packed_batch(512, 64), mesh)

    def after(remat: str) -> np.ndarray:
        frozen, trainable = lora.split(lora.init(drawn(model), lora.LoraConfig(r=4), jax.random.key(1)))
        state = create_state(trainable, optimizer, 0, mesh)
        step = make_step(sft_loss(model, remat=remat), optimizer, placement(state))
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
        leaves = [metrics["loss"], metrics["grad_norm"], *jax.tree.leaves(state.trainable)]
        return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in leaves])

    with jax.default_matmul_precision("highest"):
        return _within(after("offload"), after("full"), 1e-6)


def numbers(dry: bool = False) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, function that computes it) for the results that all devices must agree on.

    Packing to the bit; logits and a tiny run of each algorithm in float32.
    """
    from jlora import quant

    for format in quant.FORMATS:
        for dtype in ("float32", "bfloat16"):
            yield f"{format} of {dtype}, codes and scales, bits", lambda f=format, d=dtype: _digest(_packed(f, d))
            yield f"{format} of {dtype}, values, bits", lambda f=format, d=dtype: _values(_packed(f, d))
    yield "logits", _logits
    for algorithm in ("sft", "grpo") if dry else ALGORITHMS:
        yield f"tiny run, {algorithm}", functools.partial(tiny_run, algorithm)


def _logits() -> list[float]:
    import jax

    from jlora import lora, models, quant, tree

    model = models.build(TINY)
    config = quant.as_config("nf4")
    params = tree.map_with_path(
        lambda path, leaf: quant.quantize(leaf) if quant.leaf_format(path, config) else leaf, drawn(model)
    )
    params = lora.init(params, lora.LoraConfig(r=4), jax.random.key(1))
    batch = {name: rows[0] for name, rows in packed_batch(512, 64).items()}
    with jax.default_matmul_precision("highest"):
        logits = model(params, batch["tokens"], batch["positions"], batch["segment_ids"])
    return np.asarray(logits[:, ::16, ::64]).ravel().tolist()


def drawn(model: Any) -> dict[str, Any]:
    """Random float32 params that are equal to the bit on every device, which JAX's own normal numbers are not."""
    from jlora import tree

    generator = np.random.default_rng(0)
    leaves = tree.flatten(model.abstract_params())
    draw = {path: generator.standard_normal(leaf.shape, np.float32) * 0.1 for path, leaf in leaves.items()}
    return tree.unflatten({path: value + path.endswith("scale") for path, value in draw.items()})


def tiny_run(algorithm: str) -> list[float]:
    """The losses and gradient norms of two steps in float32."""
    import jax

    from jlora.train import resolve, run
    from jlora.train.reporting.metrics import read_metrics

    with tempfile.TemporaryDirectory() as name, jax.default_matmul_precision("highest"):
        folder = pathlib.Path(name)
        settings = {
            "algorithm": algorithm,
            "model": {"path": str(_model(folder)), "dtype": "float32", "quant": "nf4"},
            "data": {"path": str(_data(folder, algorithm)), "bucket": 16},
            "lora": {"r": 4},
            "optim": {"learning_rate": 1e-3, "schedule": "constant"},
            "train": {"steps": 2, "batch_size": 4, "seq_len": 64},
        }
        if algorithm in ("grpo", "ppo"):
            rewards = folder / "rewards.py"
            rewards.write_text("def length(completions, **_):\n    return [len(text) / 8.0 for text in completions]\n")
            settings["rollout"] = {"rewards": (f"{rewards}:length",), "max_completion_length": 8, "num_generations": 2}
            settings["rollout"]["rows"] = 4
        with contextlib.redirect_stdout(None):  # standard output is for rows of results
            run(resolve(settings), folder / algorithm)
        rows = read_metrics(folder / algorithm)
    return [float(row[name]) for row in rows if "loss" in row for name in ("loss", "grad_norm")]


def _model(folder: pathlib.Path) -> pathlib.Path:
    """A folder with a tiny random model and a byte-level tokenizer."""
    import tokenizers
    import transformers

    import jlora
    from jlora import models

    path = folder / "model"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({symbol: index for index, symbol in enumerate(["<|end|>", *alphabet])}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    model = models.build(TINY)
    jlora.save_model(path, model, drawn(model), tokenizer=tokenizer)
    return path


def _data(folder: pathlib.Path, algorithm: str) -> pathlib.Path:
    """A file of eight records in the form that the algorithm learns from."""
    records = [{"prompt": f"question {i} "} for i in range(8)]
    if algorithm == "sft":
        records = [record | {"completion": f"answer {i}"} for i, record in enumerate(records)]
    elif algorithm not in ("grpo", "ppo"):
        records = [record | {"chosen": f"good {i}", "rejected": f"bad {7 * i}"} for i, record in enumerate(records)]
    path = folder / f"{algorithm}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
