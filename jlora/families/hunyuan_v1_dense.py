"""Hunyuan's dense models: norms of queries and keys after rotation, and a rotary base that is stretched once."""

from typing import Any

from jlora.families.family import Family, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import ATTENTION_BIAS, SILU, Gguf, Reading
from jlora.families.kinds import POSITIVE, ROTARY
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    bias = fields.get("attention_bias", False)
    values = common(fields, norm_eps=1e-5)
    rope = fields.rope()
    if rope.get("rope_type", rope.get("type")) == "dynamic" and rope.get("alpha"):
        stretched = stretched_rope(fields, rope, values["head_dim"])
        values |= common(fields.replaced(rope_parameters=None, rope_scaling=stretched), norm_eps=1e-5)
    return values | {"qk_norm": "rotated", "qkv_bias": bias, "output_bias": bias}


def stretched_rope(fields: Fields, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The plain rotation that "dynamic" with a fixed `alpha` is: NTK-aware scaling by it, whatever the length."""
    alpha = fields.of_kind(POSITIVE, "rotary parameter alpha", rope["alpha"], 1.0)
    theta = fields.of_kind(ROTARY["rope_theta"], "rotary parameter rope_theta", rope.get("rope_theta"))
    theta = theta or fields.get("rope_theta", 10000.0)
    return {"rope_type": "default", "rope_theta": theta * alpha ** (head_dim / max(head_dim - 2, 1))}


FAMILY = Family(
    model_types=("hunyuan_v1_dense",),
    class_name="HunYuanDenseV1ForCausalLM",
    read=read,
    names=Names(qk_norms=("query_layernorm", "key_layernorm")),
    score="HunYuanDenseV1",
    gguf=Gguf(
        "hunyuan-dense",
        Reading(constants=SILU, biases=ATTENTION_BIAS),
        modules={"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
)
