"""PEFT adapter folders: the same bytes for the same adapter, read strictly: all of it fits, or nothing is loaded."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors.numpy import save_file

from jlora import lora, quant, sharding, tree
from jlora.hub import names
from jlora.hub.adapter_config import AdapterConfig, to_json
from jlora.hub.folder import replacing
from jlora.hub.source import locate
from jlora.hub.weights import listing, read_json, read_tensor, tensor_infos
from jlora.types import Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
STALE = ("adapter_model*",)
PREFIX = "base_model.model."
A, B, BASE = ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"


class Linear(NamedTuple):
    """One linear of the base as PEFT sees it: where it is in the tree, and its sizes."""

    path: str
    layer: int
    inputs: int
    outputs: int


def save_adapter(path: str | Path, params: Params, base: str | None = None) -> None:
    """Write the adapter in `params` as a PEFT folder, complete or not at all; the same adapter gives the same bytes.

    Args:
        base: the Hub id or path of the base model, for adapter_config.json.

    Raises:
        ValueError: there is no adapter in `params`.
        FileExistsError: `path` holds something other than an adapter.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    dropout = 0.0
    modules = _modules(params)
    for module_path, module in modules.items():
        if "lora_a" not in module:
            continue
        dropout = max(dropout, _dropout(module))
        for name, a, b, scale in _unstacked(module_path, module):
            tensors |= {f"{PREFIX}{name}{A}": a, f"{PREFIX}{name}{B}": b}
            ranks[name], alphas[name] = a.shape[0], _tidy(scale * a.shape[0])
    if not ranks:
        raise ValueError("there is no adapter in these params (no lora_a leaf); make one with jlora.lora.init")
    config = to_json(ranks, alphas, linears=_linears(params), dropout=dropout, base=base)
    with replacing(path, marker=CONFIG, stale=STALE) as folder:
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / "README.md").write_text(_card(config), encoding="utf-8")


def load_adapter(params: Params, path: str | Path) -> Params:
    """The params with the adapter of a PEFT folder (or Hub id) in place of whatever adapter they had.

    Layers that the adapter leaves out get rank 0: zero leaves, and a `lora_rank` leaf beside them.

    Raises:
        FileNotFoundError: the folder or its files are missing.
        ValueError: features that jlora does not have; missing, unknown and misshapen tensors. All are listed.
    """
    folder = locate(path)
    config = AdapterConfig.from_json(read_json(folder / CONFIG), folder / CONFIG)
    file = _weights(folder)
    found = tensor_infos([file])
    linears = _linears(params)
    leaves = tree.flatten(lora.strip(params))
    shapes = {name: info.shape for name, info in found.items() if not _is_base_copy(file, name, linears, leaves)}
    adapted = _adapted(shapes, linears, config, file)
    by_path: dict[str, list[str]] = {}
    for name in adapted:
        by_path.setdefault(linears[name].path, []).append(name)
    for module_path, members in by_path.items():
        layers = {linears[name].layer: _read(file, name) for name in members}
        scales = {linears[name].layer: config.scale(name) for name in members}
        kernel = leaves[f"{module_path}/kernel"]
        for leaf, value in _stacked(
            layers, scales, kernel, config.lora_dropout, tree.stack_of(module_path) is not None
        ).items():
            leaves[f"{module_path}/{leaf}"] = _place(f"{module_path}/{leaf}", value, kernel)
    return tree.unflatten(leaves)


def _modules(params: Params) -> dict[str, dict[str, Any]]:
    """Module path → its leaves, for every linear of the tree."""
    modules: dict[str, dict[str, Any]] = {}
    for path, leaf in tree.flatten(params).items():
        module, _, name = path.rpartition("/")
        modules.setdefault(module, {})[name] = leaf
    return {path: module for path, module in modules.items() if "kernel" in module}


def _linears(params: Params) -> dict[str, Linear]:
    """Hub module name → the linear, in the order of the tree."""
    found: dict[str, Linear] = {}
    for path, module in _modules(params).items():
        shape = module["kernel"].shape
        for layer, name in enumerate(names.module_names(path, shape[0])):
            found[name] = Linear(path, layer, shape[-2], shape[-1])
    return found


def _unstacked(path: str, module: Mapping[str, Any]) -> Iterable[tuple[str, np.ndarray, np.ndarray, float]]:
    """(Hub name, A [r, in], B [out, r], scale) of every layer that has an adapter, in float32."""
    a, b = (np.asarray(module[leaf], np.float32) for leaf in ("lora_a", "lora_b"))
    scales = np.asarray(module["lora_scale"], np.float64)
    if tree.stack_of(path) is None:
        a, b, scales = a[None], b[None], scales[None]
    ranks = np.broadcast_to(np.asarray(module.get("lora_rank", a.shape[-1])), (len(a),))
    for name, a_layer, b_layer, scale, rank in zip(names.module_names(path, len(a)), a, b, scales, ranks, strict=True):
        if rank:
            a_hub, b_hub = a_layer[:, :rank].T, b_layer[:rank].T
            yield name, np.ascontiguousarray(a_hub), np.ascontiguousarray(b_hub), float(scale)


def _dropout(module: Mapping[str, Any]) -> float:
    return float(np.max(module["lora_dropout"])) if "lora_dropout" in module else 0.0


def _tidy(alpha: float) -> int | float:
    """The integer that alpha was before its scale was rounded to float32, if it was one."""
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) <= 1e-6 * max(1.0, abs(alpha)) else alpha


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / PICKLE).is_file():
        raise ValueError(
            f"{folder} has only {PICKLE}, a pickle, which runs code when opened, so jlora does not read it; "
            f"load it with PEFT and save it again: save_pretrained writes {WEIGHTS}"
        )
    raise FileNotFoundError(f"no {WEIGHTS} in {folder}; files there: {listing(folder)}")


def _adapted(
    found: Mapping[str, tuple[int, ...]], linears: Mapping[str, Linear], config: AdapterConfig, file: Path
) -> list[str]:
    """The linears that the file's tensors are for, in the model's order.

    Raises:
        ValueError: every tensor that is missing, unknown or misshapen.
    """
    present = {name for name in linears if any(f"{PREFIX}{name}{part}" in found for part in (A, B))}
    wanted = {name for name in linears if (name in present if config.targets(name) is None else config.targets(name))}
    problems: list[str] = []
    expected: dict[str, tuple[int, ...]] = {}
    for name in linears:
        if name in wanted:
            rank = config.rank(name)
            expected[f"{PREFIX}{name}{A}"] = (rank, linears[name].inputs)
            expected[f"{PREFIX}{name}{B}"] = (linears[name].outputs, rank)
    problems += [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems += [
        f"unknown {name} {shape}{_why(name, present)}" for name, shape in found.items() if name not in expected
    ]
    if not expected and not problems:
        problems.append(f"target_modules={config.target_modules!r} match no linear of the model")
    if problems:
        raise ValueError(f"{file} does not fit the model; nothing was loaded:\n  " + "\n  ".join(sorted(problems)))
    return [name for name in linears if name in wanted]


def _why(tensor: str, present: set[str]) -> str:
    if not tensor.startswith(PREFIX):
        return f": PEFT's names begin with {PREFIX!r}"
    module = tensor.removeprefix(PREFIX).removesuffix(A).removesuffix(B)
    return f": {CONFIG} does not target this module" if module in present else ": the model has no such linear"


def _is_base_copy(file: Path, tensor: str, linears: Mapping[str, Linear], leaves: Mapping[str, Any]) -> bool:
    """Whether the tensor repeats the base's own head, as PEFT writes it beside an adapter of the head."""
    linear = linears.get(tensor.removeprefix(PREFIX).removesuffix(BASE))
    if linear is None or not tensor.endswith(BASE):
        return False
    kernel = leaves[f"{linear.path}/kernel"]
    values = read_tensor(file, tensor).astype(np.float32).T
    if quant.is_packed(kernel) or kernel.shape != values.shape:
        return False
    return np.allclose(np.asarray(kernel, np.float32), values, rtol=0.01, atol=1e-6)


def _read(file: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A [in, r] and B [r, out] in float32."""
    a, b = (read_tensor(file, f"{PREFIX}{name}{part}").astype(np.float32).T for part in (A, B))
    return a, b


def _stacked(
    layers: Mapping[int, tuple[np.ndarray, np.ndarray]],
    scales: Mapping[int, int | float],
    kernel: Any,
    dropout: float,
    stacked: bool,
) -> dict[str, np.ndarray]:
    """The adapter leaves beside one kernel, padded with zeros to the widest rank."""
    count = kernel.shape[0] if stacked else 1
    widest = max(a.shape[1] for a, _ in layers.values())
    lora_a = np.zeros((count, kernel.shape[-2], widest), np.float32)
    lora_b = np.zeros((count, widest, kernel.shape[-1]), np.float32)
    scale, rank = np.zeros(count, np.float32), np.zeros(count, np.int32)
    for layer, (a, b) in layers.items():
        rank[layer], scale[layer] = a.shape[1], scales[layer]
        lora_a[layer, :, : a.shape[1]], lora_b[layer, : a.shape[1]] = a, b
    leaves = {"lora_a": lora_a, "lora_b": lora_b, "lora_scale": scale}
    if np.any(rank != widest):
        leaves["lora_rank"] = rank
    if dropout:
        leaves["lora_dropout"] = np.full(count, dropout, np.float32)
    return leaves if stacked else {name: value.reshape(value.shape[1:]) for name, value in leaves.items()}


def _place(path: str, value: np.ndarray, kernel: Any) -> jax.Array:
    """The leaf on the devices that hold the kernel."""
    placed = getattr(jax.tree.leaves(kernel)[0], "sharding", None)
    if isinstance(placed, NamedSharding):
        return jax.device_put(value, sharding.leaf_sharding(path, value, placed.mesh))
    return jnp.asarray(value)


def _card(config: Mapping[str, Any]) -> str:
    """A short model card; its header is what the Hub reads."""
    base = config["base_model_name_or_path"]
    header = [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "---",
    ]
    targets = ", ".join(f"`{name}`" for name in config["target_modules"])
    body = [
        "",
        "# LoRA adapter",
        "",
        f"Trained with jlora{f' on `{base}`' if base else ''}.",
        f"Rank {config['r']}, alpha {config['lora_alpha']}, on {targets}.",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(header + body)
