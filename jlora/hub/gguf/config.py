"""Turns a GGUF file's metadata into the config.json that the same model has on the Hub."""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import UserError
from jlora.families import FAMILIES, Family, each
from jlora.families.gguf import FREQUENCIES, Config, Metadata, Reading, shortest

# GGUF's names for LongRoPE's divisors of the rotary frequencies.
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
ROTARY = frozenset((FREQUENCIES, SHORT, LONG))
# Llama 3's rope scaling as Meta published it; GGUF keeps only the divisors it leads to.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
# YaRN's settings: config.json's name → GGUF's.
YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}

# Key → the only values that most families compute: causal attention, and softmax routing without a factor.
ONLY = {"attention.causal": (True,), "expert_gating_func": (0, 1), "expert_weights_scale": (0.0, 1.0)}


def read_config(
    path: Path, fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], values: Callable[[str], np.ndarray]
) -> Config:
    """The config.json that the model would have on the Hub.

    Args:
        path: the file, for messages.
        fields: all metadata but the vocabulary.
        tensors: GGUF's name → shape, slowest axis first.
        values: (a tensor's GGUF name) → its values.

    Raises:
        ValueError: no family has the architecture, or keys are missing or ask for what jlora does not compute; all keys
            are listed.
    """
    metadata = Metadata(path, fields, tensors, values)
    family = _family(metadata)
    reading = family.gguf.reading
    config = {
        **{name: metadata.require(key) for name, key in reading.required.items()},
        **{name: value for name, key in reading.optional.items() if (value := metadata.number(key))},
        **reading.constants,
        **{name: tensor in tensors for name, tensor in reading.biases.items()},
        **special_tokens(fields),
        "architectures": [family.class_name],
        "model_type": family.model_types[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    config |= _vocabulary(metadata)
    config |= reading.more(metadata, config)
    if reading.theta:
        config |= _rotary(metadata, config, reading, values)
    for key, supported in ONLY.items():
        if key not in metadata.seen:
            metadata.only(key, *supported)
    if fields.get("split.count", 0) > 1:
        metadata.problems.append(f"split.count is {fields['split.count']}: merge the parts with llama-gguf-split first")
    metadata.finish()
    return config


def without_ahead(fields: Mapping[str, Any], tensors: Collection[str]) -> tuple[dict[str, Any], set[str]]:
    """(metadata, the names of tensors) without the last layers, if these only predict tokens further ahead.

    transformers leaves such layers out too.
    """
    prefix = f"{fields.get('general.architecture')}."
    ahead, count = fields.get(f"{prefix}nextn_predict_layers"), fields.get(f"{prefix}block_count")
    if not isinstance(ahead, int) or not isinstance(count, int) or not 0 < ahead < count:
        return dict(fields), set(tensors)
    kept = {
        name: value[: count - ahead]
        if name.startswith(prefix) and isinstance(value, list) and len(value) == count
        else value
        for name, value in fields.items()
        if name != f"{prefix}nextn_predict_layers"
    }
    dropped = tuple(f"blk.{layer}." for layer in range(count - ahead, count))
    return kept | {f"{prefix}block_count": count - ahead}, {name for name in tensors if not name.startswith(dropped)}


def special_tokens(fields: Mapping[str, Any]) -> Config:
    """The ids of the tokens that begin, end and pad a text."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def generation_config(fields: Mapping[str, Any]) -> Config | None:
    """generation_config.json, or None; chat models may end a turn and a text with different tokens."""
    tokens = special_tokens(fields)
    eos, end_of_turn = tokens.get("eos_token_id"), fields.get("tokenizer.ggml.eot_token_id")
    if eos is not None and end_of_turn is not None and end_of_turn != eos:
        tokens["eos_token_id"] = [eos, end_of_turn]
    return tokens or None


def _family(metadata: Metadata) -> Family:
    """The family of the file: of those that share its architecture, the last one whose mark it has.

    Raises:
        ValueError: there is none.
    """
    for family in reversed(FAMILIES.values()):
        if family.gguf and family.gguf.reading and family.gguf.architecture == metadata.architecture:
            mark = family.gguf.reading.mark
            if mark is None or metadata.number(mark):
                return family
    found = metadata.fields.get("general.architecture")
    known = each(lambda family: family.gguf.architecture if family.gguf else None)
    raise UserError(f"{metadata.path} has architecture {found!r}; GGUF is read for {', '.join(known)}")


def _vocabulary(metadata: Metadata) -> Config:
    if "token_embd.weight" not in metadata.tensors:
        metadata.problems.append("no tensor token_embd.weight")
    return {"vocab_size": metadata.tensors.get("token_embd.weight", (1,))[0]}


def _rotary(metadata: Metadata, config: Config, reading: Reading, values: Callable[[str], np.ndarray]) -> Config:
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    turned = metadata.number("rope.dimension_count", head_dim)
    theta = metadata.get("rope.freq_base", 10000.0)
    found = {reading.theta: theta}
    if reading.share:
        found[reading.share] = _share(turned, head_dim)
    elif turned != head_dim:
        metadata.problems.append(
            f"{metadata.name('rope.dimension_count')}: {turned} of {head_dim} values of a head are rotated; "
            f"partial rotation is not supported for {metadata.architecture}"
        )
    scaled = _rope_scaling(metadata, config, values, theta=theta, turned=turned)
    if "rope_scaling" in scaled:
        scaled["rope_scaling"] |= reading.scaling(metadata)
    return found | scaled


def _share(part: int, whole: int) -> float:
    """The fraction f for which int(whole · f), which readers compute, is `part`."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1.0)


def _rope_scaling(
    metadata: Metadata, config: Config, values: Callable[[str], np.ndarray], *, theta: float, turned: int
) -> Config:
    kind = metadata.get("rope.scaling.type", "linear")
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear"))
    original = metadata.get("rope.scaling.original_context_length")
    if {SHORT, LONG} & set(metadata.tensors):
        return _longrope(metadata, config, values, original=original)
    if kind != "yarn":
        metadata.only("rope.scaling.attn_factor", 1.0)
    if FREQUENCIES in metadata.tensors:
        return _llama3(metadata, values(FREQUENCIES), theta=theta, turned=turned)
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn":
        return _yarn(metadata)
    supported = f"linear, yarn, Llama 3's ({FREQUENCIES}) and LongRoPE ({SHORT}, {LONG}) are read"
    metadata.problems.append(f"{metadata.name('rope.scaling.type')} is {kind!r}; {supported}")
    return {}


def _yarn(metadata: Metadata) -> Config:
    """YaRN (Peng et al. 2023)."""
    metadata.only("rope.scaling.yarn_ext_factor", 1.0, -1.0)  # -1 means on in llama.cpp
    found = {name: metadata.get(f"rope.scaling.{key}") for name, key in YARN.items()}
    # llama.cpp multiplies the usual factor by this; it does not use what its converter writes for a model's own factor.
    ratio = metadata.get("rope.scaling.attn_factor", 1.0)
    if ratio != 1:
        found["attention_factor"] = ratio * yarn_attention(metadata.require("rope.scaling.factor"))
    scaling = {
        "rope_type": "yarn",
        "factor": metadata.require("rope.scaling.factor"),
        "original_max_position_embeddings": metadata.require("rope.scaling.original_context_length"),
        **{name: value for name, value in found.items() if value is not None},
    }
    return {"rope_scaling": scaling}


def yarn_attention(factor: float) -> float:
    """YaRN's default factor of cos and sin."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(
    metadata: Metadata, config: Config, values: Callable[[str], np.ndarray], *, original: int | None
) -> Config:
    """LongRoPE (Ding et al. 2024): one list of divisors for short texts and one for long ones."""
    longest = config["max_position_embeddings"]
    original = original or longest
    scaling: Config = {"rope_type": "longrope"}
    for name, tensor in (("short_factor", SHORT), ("long_factor", LONG)):
        if tensor not in metadata.tensors:
            metadata.problems.append(f"no tensor {tensor}")
        else:
            scaling[name] = [shortest(float(value)) for value in values(tensor)]
    usual = math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0
    attention = metadata.get("rope.scaling.attn_factor", usual)
    if not math.isclose(attention, usual, rel_tol=1e-5):
        scaling["attention_factor"] = attention
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _llama3(metadata: Metadata, divisors: np.ndarray, *, theta: float, turned: int) -> Config:
    """Llama 3's parameters that give these divisors of the rotary frequencies; they are computed again as a check."""
    factor = round(float(divisors.max()), 3)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, turned, 2) / turned)
    kept = np.clip((LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5):
        metadata.problems.append(f"{FREQUENCIES} is not Llama 3's rope scaling with factor {factor}")
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
    return {"rope_scaling": scaling}
