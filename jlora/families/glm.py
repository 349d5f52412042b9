"""GLM 4 (9B): neighbouring values of half of each head rotated together, a fused MLP, biases in attention."""

from jlora.families.family import Family, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import ATTENTION_BIAS, SILU, Config, Gguf, Metadata, Reading, require_even_heads
from jlora.families.reading import common, interleaved

SHARE = "partial_rotary_factor"


def read(fields: Fields) -> Values:
    partial = fields.get(SHARE, 0.5)
    values = common(fields, num_key_value_heads=2, head_dim=128, norm_eps=1.5625e-07, partial=partial)
    return interleaved(values) | {"qkv_bias": fields.get("attention_bias", True)}


def from_gguf(metadata: Metadata, config: Config) -> Config:
    # Only part of a head is rotated, so its size does not follow from rope.dimension_count.
    count = config["num_attention_heads"]
    head_dim = metadata.number("attention.key_length", config["hidden_size"] // count)
    metadata.only("attention.value_length", head_dim)
    return {"head_dim": head_dim, "num_key_value_heads": metadata.number("attention.head_count_kv", count)}


def from_chatglm(metadata: Metadata, config: Config) -> Config:
    require_even_heads(metadata, config["hidden_size"], config["num_attention_heads"])
    return from_gguf(metadata, config)


READING = Reading(constants=SILU, biases=ATTENTION_BIAS, more=from_gguf, share=SHARE)
FAMILY = Family(
    model_types=("glm",),
    class_name="GlmForCausalLM",
    read=read,
    names=Names(mlp_up=("gate_up_proj",)),
    score="Glm",
    gguf=Gguf("chatglm", READING._replace(more=from_chatglm)),
)
