"""Qwen 3.5, alone or with its vision tower: Qwen 3 Next's layers without experts, its fused linears taken apart."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jlora.families import qwen3_next
from jlora.families.family import Delta, Family, Values
from jlora.families.fields import Fields
from jlora.families.gguf import DECODER, SILU, Config, Gguf, Metadata, Reading
from jlora.families.layouts import Joined, Layout, Sizes
from jlora.families.multimodal import TextHalf, multimodal
from jlora.families.qwen3_next import NAMES, SENSITIVE, read_common


def read(fields: Fields) -> Values:
    return read_common(fields, fused=False)


# ---------------------------------------------------------------- GGUF
# llama.cpp has value heads in another order: the first of each key head, then the second of each, and so on.


def from_gguf(metadata: Metadata, config: Config) -> Config:
    metadata.get("rope.dimension_sections")  # which positions of an image turn what: they are the same in texts
    return qwen3_next.from_gguf(metadata, config)


def sections(config: Any) -> list[int]:
    """How many of the rotated pairs turn with a token's time, height and width; in texts, these are its position."""
    pairs = config.ropes[0].dim // 2
    return [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]


def _in_turns(values: Any, delta: Delta) -> Any:
    """Rows of value heads, from key head by key head to llama.cpp's order."""
    heads = values.reshape(delta.key_heads, delta.value_heads // delta.key_heads, -1, *values.shape[1:])
    return heads.swapaxes(0, 1).reshape(values.shape)


def _by_key(values: Any, delta: Delta) -> Any:
    heads = values.reshape(delta.value_heads // delta.key_heads, delta.key_heads, -1, *values.shape[1:])
    return heads.swapaxes(0, 1).reshape(values.shape)


def _values_only(sort: Callable[[Any, Delta], Any], values: Any, delta: Delta) -> Any:
    """The rows of queries, keys and values with those of values sorted."""
    before = 2 * delta.key_heads * delta.key_dim
    return values.__array_namespace__().concat([values[:before], sort(values[before:], delta)])


def _channels(sort: Callable[[Any, Delta], Any]) -> Callable[[Any, Sizes], Any]:
    """What sorts a number for each value head, or the convolution's channels."""

    def sorted_by(values: Any, sizes: Sizes) -> Any:
        own = values.shape[0] == sizes.delta.value_heads
        return sort(values, sizes.delta) if own else _values_only(sort, values, sizes.delta)

    return sorted_by


def _columns(values: np.ndarray, sizes: Sizes, sort: Callable[[Any, Delta], Any]) -> np.ndarray:
    return sort(values.T, sizes.delta).T


HEADS = Layout(lambda x, sizes: _by_key(x, sizes.delta), lambda x, sizes: _in_turns(x, sizes.delta), outputs_only=True)
MIXED = Layout(
    lambda x, sizes: _values_only(_by_key, x, sizes.delta),
    lambda x, sizes: _values_only(_in_turns, x, sizes.delta),
    outputs_only=True,
)
OUTPUT = Layout(
    lambda x, sizes: _columns(x, sizes, _by_key), lambda x, sizes: _columns(x, sizes, _in_turns), inputs_only=True
)
LAYOUTS = (
    (r"blk\.\d+\.(attn_gate|ssm_alpha|ssm_beta)\.weight", HEADS),
    (r"blk\.\d+\.attn_qkv\.weight", MIXED),
    (r"blk\.\d+\.ssm_out\.weight", OUTPUT),
    *qwen3_next.NORMS,
)
MODULES = {
    **qwen3_next.MODULES,
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
}
WRITES = {**qwen3_next.WRITES, "rope.dimension_sections": sections}
JOINED: tuple[Joined, ...] = qwen3_next.recurrence(_channels(_in_turns), _channels(_by_key))

FAMILY = Family(
    model_types=("qwen3_5_text",),
    class_name="Qwen3_5ForCausalLM",
    read=read,
    names=NAMES,
    score="Qwen3_5Text",
    unpacked=SENSITIVE,
    buffers=(r".*\.rotary_emb\.inv_freq", r"mtp\..*"),
    gguf=Gguf(
        "qwen35",
        Reading(required={**DECODER, **qwen3_next.DELTA_SIZES}, constants=SILU, more=from_gguf, share=qwen3_next.SHARE),
        writes=WRITES,
        modules=MODULES,
        layouts=LAYOUTS,
        joined=JOINED,
    ),
)

# The tower, and the layer that predicts further tokens, which transformers leaves out too.
OTHERS = r"(model\.)?visual\..+|mtp\..+"
ONLY_SEEING = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
MULTIMODAL = (
    multimodal(
        TextHalf(families=(FAMILY,), others=OTHERS, fields=ONLY_SEEING, tied=False),
        model_types=("qwen3_5",),
        class_name="Qwen3_5ForConditionalGeneration",
        score="Qwen3_5",
    ),
)
