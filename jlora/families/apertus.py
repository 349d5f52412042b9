"""Apertus: Llama with query-key norms, and with an activation whose slopes are learned instead of a gate."""

from jlora.families.family import Family, Names, Values
from jlora.families.fields import Fields
from jlora.families.reading import common

# What transformers takes where config.json says nothing of rotary positions.
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def read(fields: Fields) -> Values:
    if not fields.rope():
        fields = fields.replaced(rope_parameters=ROPE)
    bias = fields.get("attention_bias", False)
    return common(fields, norm_eps=1e-5, rope_theta=12e6, activation=("hidden_act", "xielu")) | {
        "qk_norm": "head",
        "qkv_bias": bias,
        "output_bias": bias,
        "gated": False,
    }


FAMILY = Family(
    model_types=("apertus",),
    class_name="ApertusForCausalLM",
    read=read,
    names=Names(
        mlp_up=("up_proj",),
        activation="act_fn",
        attention_norms=("attention_layernorm", None),
        mlp_norms=("feedforward_layernorm", None),
    ),
)
