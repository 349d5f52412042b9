"""Seed-OSS: Llama with biases of queries, keys and values, and apart from them of the output."""

from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.gguf import ATTENTION_BIAS, SILU, Gguf, Reading
from jlora.families.kinds import FLAG
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    return common(fields, num_key_value_heads=8, head_dim=128) | {
        "qkv_bias": fields.get("attention_bias", True),
        "output_bias": fields.get("attention_out_bias", False, FLAG),
        "mlp_bias": fields.get("mlp_bias", False),
    }


FAMILY = Family(
    model_types=("seed_oss",),
    class_name="SeedOssForCausalLM",
    read=read,
    score="SeedOss",
    gguf=Gguf(
        "seed_oss",
        Reading(constants={**SILU, "attention_out_bias": False}, biases=ATTENTION_BIAS),
        modules={"ffn_norm": None, "post_attention_norm": "post_attention_layernorm"},
    ),
)
