#!/usr/bin/env python3
"""How fast are weights packed for llama.cpp, and how exactly, beside its own packing?

    python benchmarks/gguf_packing.py [--rows 1024] [--columns 4096] [--rounds 3] [--library libggml-base.so]
    python benchmarks/gguf_packing.py --whole

Normal weights on one core: values packed in a second (the best of some rounds, by CPU time), and the root mean square
error as a share of the weights' own. llama.cpp's library is that of llama-cpp-python, if it is installed.
`--whole` writes a file of Llama 3.2 1B's shape as q4_k_m from bfloat16: CPU time, and the peak of memory beside the
weights.
"""

import argparse
import ctypes
import importlib.util
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import record
import rich.console
import rich.table

from jlora import hub, models
from jlora.hub.gguf import kquants

SHAPE = dict(
    model_type="llama",
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
TYPES = (*kquants.KINDS, "Q4_0", "Q5_0", "Q8_0")


def ours(values: np.ndarray, type: str) -> np.ndarray:
    if type in kquants.KINDS:
        return kquants.quantize(values, type)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type])


def theirs(library: str) -> Callable[[np.ndarray, str], np.ndarray]:
    pack = ctypes.CDLL(library).ggml_quantize_chunk
    pack.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def run(values: np.ndarray, type: str) -> np.ndarray:
        number = gguf.GGMLQuantizationType[type]
        block, size = gguf.GGML_QUANT_SIZES[number]
        packed = np.empty((len(values), values.shape[1] // block * size), np.uint8)
        pack(int(number), values.ctypes.data, packed.ctypes.data, 0, *values.shape, None)
        return packed

    return run


def installed() -> str | None:
    """The path of llama-cpp-python's library of types."""
    spec = importlib.util.find_spec("llama_cpp")
    folder = pathlib.Path(spec.origin).parent / "lib" if spec else pathlib.Path()
    return next(map(str, folder.glob("libggml-base.*")), None) if spec else None


def measure(pack: Callable[[np.ndarray, str], np.ndarray], values: np.ndarray, type: str, rounds: int) -> dict:
    """Million values a second, and the error."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        packed = pack(values, type)
        times.append(time.process_time() - start)
    off = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[type]) - values
    error = float(np.sqrt(np.mean(np.square(off)) / np.mean(np.square(values))))
    return {"million_per_second": round(values.size / min(times) / 1e6, 1), "error": round(error, 5)}


def whole(layers: int) -> dict:
    """What a whole file takes; all of its weights are the same four million."""
    model = models.build(SHAPE | dict(num_hidden_layers=layers))
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 22, np.float32)).astype(jnp.bfloat16)
    shapes = jax.eval_shape(model.random_params, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.resize(noise, leaf.shape), shapes)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before, start = _peak(), time.process_time()
        hub.save_gguf(pathlib.Path(folder) / "model.gguf", model, params, dtype="q4_k_m")
        seconds, size = time.process_time() - start, (pathlib.Path(folder) / "model.gguf").stat().st_size
    found = {"values": count, "seconds": round(seconds, 1), "GiB": round(_peak() - before, 2)}
    return found | {"million_per_second": round(count / seconds / 1e6, 1), "file_GiB": round(size / 2**30, 2)}


def _peak() -> float:
    """The peak of this process's resident memory, in GiB."""
    return int(re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--library", default=installed(), help="llama.cpp's library of types")
    parser.add_argument("--out", type=pathlib.Path, help="where the figures go instead of benchmarks/results")
    parser.add_argument("--whole", action="store_true", help="only what a whole file takes")
    parser.add_argument("--layers", type=int, default=16, help="of the whole file")
    options = parser.parse_args()
    if options.whole:
        print(found := whole(options.layers))
        record.save("gguf_file", found, device="cpu", path=options.out)
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # so that threads do not wait for each other's caches
    values = 0.02 * np.random.default_rng(0).standard_normal((options.rows, options.columns), np.float32)
    sides = {"jlora": ours} | ({"llama.cpp": theirs(options.library)} if options.library else {})
    figures = {
        type: {side: measure(pack, values, type, options.rounds) for side, pack in sides.items()} for type in TYPES
    }
    table = rich.table.Table("", *(f"{side}, {what}" for side in sides for what in ("million/s", "error")))
    for type, found in figures.items():
        table.add_row(type, *(str(number) for one in found.values() for number in one.values()))
    rich.console.Console().print(table)
    record.save("gguf_packing", figures, device="cpu", path=options.out)


if __name__ == "__main__":
    main()
