"""The GGUF metadata that llama.cpp needs to compute a model: the inverse of `jlora.hub.gguf.config`.

The metadata is read back and compared, so a model that the format cannot describe is refused, never changed.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora import models
from jlora.errors import UserError
from jlora.families import FAMILIES
from jlora.families.gguf import FREQUENCIES, IDLE, Gguf
from jlora.families.layouts import Sizes
from jlora.hub.gguf.config import LONG, SHORT, YARN, read_config, yarn_attention
from jlora.models.config import ModelConfig, Rope
from jlora.models.rope import inverse_frequencies

HEAD = "output.weight"
# Fields of a model's config that do not affect what it computes.
APART = ("model_type", "names", "source", "eos_token_ids", "tie_word_embeddings")


def gguf_of(config: ModelConfig) -> Gguf:
    """How llama.cpp's files hold such a model.

    Raises:
        ValueError: they do not.
    """
    gguf = FAMILIES[config.model_type].gguf
    if gguf is None:
        raise UserError(f"jlora does not write {config.model_type} models as GGUF")
    return gguf


def sizes_of(config: ModelConfig) -> Sizes:
    """The sizes that layouts depend on."""
    return Sizes(config.num_attention_heads, config.num_key_value_heads, config.delta, config.latent)


def describe(config: ModelConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata by full key, tensors of rotary divisors by name)."""
    gguf = gguf_of(config)
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
        f"attention.layer_norm{'' if config.norm == 'layer' else '_rms'}_epsilon": config.norm_eps,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        **_windows(config, gguf.period),
    }
    if config.experts:
        keys |= {"expert_count": config.experts.count, "expert_used_count": config.experts.top_k}
    tensors: dict[str, np.ndarray] = {}
    if config.ropes:
        rotary, tensors = _rotary(config.ropes[0])
        keys |= rotary
    if len(config.ropes) > 1:
        keys["rope.freq_base_swa"] = float(config.ropes[1].rope_theta)
    keys |= {key: value(config) for key, value in gguf.writes.items()}
    return {f"{gguf.architecture}.{key}": value for key, value in keys.items() if value is not None}, tensors


def check(
    config: ModelConfig,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str], np.ndarray],
) -> None:
    """Checks that a file with this metadata and these tensors is read as the same model.

    Warns if llama.cpp computes the same only for texts up to the length of a window.

    Raises:
        ValueError: something would be read differently, or llama.cpp does not compute it; all is listed.
    """
    fields = {name: np.float32(value).item() if type(value) is float else value for name, value in metadata.items()}
    try:
        read = read_config(Path("the file"), fields, shapes, values)
        problems = list(_differences("", config, models.build(read).config))
    except UserError as error:
        problems = str(error).splitlines()[1:] or [str(error)]
    gguf = gguf_of(config)
    if (config.output_bias or config.mlp_bias) and not gguf.all_biases:
        problems.append(f"llama.cpp's {gguf.architecture} has biases of queries, keys and values only")
    if HEAD in shapes and gguf.own_head is False:
        problems.append(f"this model has a head of its own, and llama.cpp's {gguf.architecture} only the embedding's")
    if config.attention_softcap and not gguf.soft_caps:
        problems.append(f"llama.cpp's {gguf.architecture} does not cap attention's scores")
    if problems:
        raise UserError(f"GGUF cannot hold this {config.model_type} model:\n  " + "\n  ".join(problems))
    windows = [layer.window for layer in config.layers if layer.window is not None]
    if windows and gguf.period is None and min(windows) < config.max_position_embeddings:
        warnings.warn(
            f"llama.cpp has no window for this model: its results differ for texts of over {min(windows)} tokens",
            stacklevel=3,
        )


def _windows(config: ModelConfig, period: int | None) -> dict[str, Any]:
    windows = [layer.window for layer in config.layers]
    found = sorted({window for window in windows if window is not None})
    if not found:
        return {}
    sliding = [window is not None for window in windows]
    usual = [period is None or i % period < period - 1 for i in range(len(windows))]
    pattern = {} if sliding == usual else {"attention.sliding_window_pattern": sliding}
    return {"attention.sliding_window": found[0], **pattern}


def _rotary(rope: Rope) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    keys: dict[str, Any] = {"rope.dimension_count": rope.dim, "rope.freq_base": float(rope.rope_theta)}
    scaling = {"rope.scaling.factor": float(rope.factor)}
    original = {"rope.scaling.original_context_length": rope.original_max_position_embeddings}
    if rope.rope_type == "llama3":
        plain = dataclasses.replace(rope, rope_type="default")
        return keys, {FREQUENCIES: (inverse_frequencies(plain) / inverse_frequencies(rope)).astype(np.float32)}
    if rope.rope_type == "proportional":
        return keys, {FREQUENCIES: np.where(inverse_frequencies(rope) == 0, IDLE, 1).astype(np.float32)}
    if rope.rope_type == "longrope":
        divisors = {SHORT: rope.short_factor, LONG: rope.long_factor}
        keys |= original | {"rope.scaling.attn_factor": float(rope.attention_factor)}
        return keys, {name: np.asarray(factors, np.float32) for name, factors in divisors.items()}
    if rope.rope_type == "yarn":
        settings = {f"rope.scaling.{YARN[name]}": getattr(rope, name) for name in ("beta_fast", "beta_slow")}
        ratio = rope.attention_factor / yarn_attention(rope.factor)
        settings["rope.scaling.attn_factor"] = None if math.isclose(ratio, 1, rel_tol=1e-6) else ratio
        return keys | scaling | original | settings | {"rope.scaling.type": "yarn"}, {}
    if rope.rope_type == "linear":
        return keys | scaling | {"rope.scaling.type": "linear"}, {}
    return keys, {}  # `check` finds what cannot be written, by reading it back


def _differences(name: str, ours: Any, theirs: Any) -> Iterator[str]:
    """Yields a line for each field that differs by more than float32's rounding."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for field in dataclasses.fields(ours):
            if field.name not in APART:
                yield from _differences(
                    f"{name}.{field.name}".lstrip("."), getattr(ours, field.name), getattr(theirs, field.name)
                )
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        labels = getattr(ours, "_fields", range(len(ours)))
        for label, our, their in zip(labels, ours, theirs, strict=True):
            yield from _differences(f"{name}[{label}]", our, their)
    elif isinstance(ours, float) and isinstance(theirs, int | float):
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            yield f"{name} {ours} would come back as {theirs}"
    elif ours != theirs:
        yield f"{name} {ours!r} would come back as {theirs!r}"
