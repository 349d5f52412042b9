"""GGUF files of the `llama` architecture, dequantised one tensor at a time into the Hub's names and layout."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.hub import names
from jlora.hub.weights import TensorInfo
from jlora.types import require

ARCHITECTURES = ("llama",)
# config.json's name → GGUF's, after the architecture's name and a dot.
METADATA = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
ROPE_FREQUENCIES = "rope_freqs.weight"
# Llama 3's rope scaling as Meta published it; GGUF keeps only the divisors it leads to.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192


class GGUFFile:
    """One .gguf file, its metadata turned into the config.json and the tensor names of the same model on the Hub.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the file is damaged, or holds something other than a plain `llama` model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        fields = {name: field.contents() for name, field in self._reader.fields.items() if _is_small(name)}
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.config: dict[str, Any] = _config(path, fields, tensors)
        self.generation_config: dict[str, Any] | None = _generation_config(fields)
        hub_names = names.from_gguf(tensors)
        self._tensors = {hub_name: tensors[name] for name, hub_name in hub_names.items()}
        unknown = {name: tensors[name] for name in tensors if name not in hub_names and name != ROPE_FREQUENCIES}
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(_shape(tensor), tensor.tensor_type.name, path)
            for name, tensor in (self._tensors | unknown).items()
        }

    def rename(self, names: Mapping[str, str]) -> None:
        """Nothing: every tensor has the Hub's name already."""

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32, in the Hub's layout."""
        tensor = self._tensors[name]
        values = _dequantize(tensor).reshape(_shape(tensor))
        # This format stores the two halves of every rotary pair next to each other.
        if ".q_proj." in name:
            return _halves(values, self.config["num_attention_heads"])
        if ".k_proj." in name:
            return _halves(values, self.config["num_key_value_heads"])
        return values


def tokenizer_fields(path: Path) -> dict[str, Any]:
    """What the file says of its tokenizer: its metadata by the names that follow "tokenizer."."""
    prefix, fields = "tokenizer.", _open(path).fields
    return {name.removeprefix(prefix): field.contents() for name, field in fields.items() if name.startswith(prefix)}


def _open(path: Path) -> Any:
    gguf = require("gguf", "gguf")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is truncated, damaged or not GGUF: {error}") from error


def _is_small(name: str) -> bool:
    # The vocabulary takes seconds to unpack, and is the tokenizer's business.
    return name not in (
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",
    )


def _shape(tensor: Any) -> tuple[int, ...]:
    # GGUF lists the fastest axis first.
    return tuple(int(size) for size in tensor.shape[::-1])


def _dequantize(tensor: Any) -> np.ndarray:
    quants = require("gguf.quants", "gguf")
    try:
        return quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"{tensor.name} is packed as {tensor.tensor_type.name}, which gguf cannot unpack") from error


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows (h, f, half) reordered to (h, half, f): from interleaved rotary pairs to the Hub's two halves."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _config(path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """config.json as the Hub would have it."""
    architecture = fields.get("general.architecture")
    _check_metadata(path, architecture, fields, tensors)
    values = {name: fields[f"{architecture}.{key}"] for name, key in METADATA.items()}
    heads = values["num_attention_heads"]
    head_dim = _head_dim(path, fields, architecture, values["hidden_size"] // heads)
    theta = _shortest(fields.get(f"{architecture}.rope.freq_base", 10000.0))
    scaling = _rope_scaling(path, fields, tensors, architecture, theta=theta, head_dim=head_dim)
    return {
        **values,
        **_special_tokens(fields),
        **({"rope_scaling": scaling} if scaling else {}),
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "model_type": "llama",
        "num_key_value_heads": fields.get(f"{architecture}.attention.head_count_kv", heads),
        "rms_norm_eps": _shortest(values["rms_norm_eps"]),
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": _shape(tensors["token_embd.weight"])[0],
    }


def _check_metadata(path: Path, architecture: str | None, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path} has architecture {architecture!r}; GGUF is read for {', '.join(ARCHITECTURES)}")
    keys = [f"{architecture}.{key}" for key in METADATA.values()]
    problems = [f"no metadata {key}" for key in keys if key not in fields]
    problems += [f"no tensor {name}" for name in ("token_embd.weight",) if name not in tensors]
    if fields.get(f"{architecture}.expert_count", 0):
        problems.append("a mixture of experts, which is not read from GGUF")
    if problems:
        raise ValueError(f"{path} cannot be read as a model:\n  " + "\n  ".join(problems))


def _head_dim(path: Path, fields: dict[str, Any], architecture: str, default: int) -> int:
    rotary = fields.get(f"{architecture}.rope.dimension_count", default)
    head_dim = fields.get(f"{architecture}.attention.key_length", rotary)
    if rotary != head_dim:
        raise ValueError(f"{path} rotates {rotary} of {head_dim} values of a head; partial rotation is not supported")
    return head_dim


def _special_tokens(fields: dict[str, Any]) -> dict[str, Any]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def _generation_config(fields: dict[str, Any]) -> dict[str, Any] | None:
    """generation_config.json: chat models may end a turn with another token than a text."""
    tokens = _special_tokens(fields)
    eos, end_of_turn = tokens.get("eos_token_id"), fields.get("tokenizer.ggml.eot_token_id")
    if eos is not None and end_of_turn is not None and end_of_turn != eos:
        tokens["eos_token_id"] = [eos, end_of_turn]
    return tokens or None


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the float32 `value`: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    path: Path, fields: dict[str, Any], tensors: dict[str, Any], architecture: str, *, theta: float, head_dim: int
) -> dict[str, Any] | None:
    kind = fields.get(f"{architecture}.rope.scaling.type", "none")
    factor = fields.get(f"{architecture}.rope.scaling.factor", fields.get(f"{architecture}.rope.scale_linear"))
    if ROPE_FREQUENCIES in tensors:
        return _llama3_scaling(path, _dequantize(tensors[ROPE_FREQUENCIES]), theta=theta, head_dim=head_dim)
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _shortest(factor)}
    raise ValueError(f"{path} scales its rotary positions by {kind!r}; from GGUF, linear and Llama 3's are read")


def _llama3_scaling(path: Path, divisors: np.ndarray, *, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters that give these divisors of the rotary frequencies, checked by computing them again."""
    factor = round(float(divisors.max()), 3)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5):
        raise ValueError(f"{path}: {ROPE_FREQUENCIES} is not Llama 3's rope scaling with factor {factor}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
