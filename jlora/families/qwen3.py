"""Qwen 3: norms of each head's query and key instead of biases."""

from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.gguf import ATTENTION_BIAS, QK_NORMS, SILU, Gguf, Reading
from jlora.families.qwen2 import read_layers
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    values = common(fields, head_dim=128)
    return values | read_attention(fields) | {"layers": read_layers(fields, values["num_hidden_layers"])}


def read_attention(fields: Fields) -> Values:
    bias = fields.get("attention_bias", False)
    return {"qk_norm": "head", "qkv_bias": bias, "output_bias": bias}


FAMILY = Family(
    model_types=("qwen3",),
    class_name="Qwen3ForCausalLM",
    read=read,
    score="Qwen3",
    gguf=Gguf(
        "qwen3",
        Reading(constants={**SILU, "use_sliding_window": False}, biases=ATTENTION_BIAS),
        modules=QK_NORMS,
    ),
)
