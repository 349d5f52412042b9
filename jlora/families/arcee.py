"""Arcee (AFM): Llama with a squared ReLU instead of a gate."""

from jlora.families.family import Family, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import Gguf, Reading
from jlora.families.layouts import INTERLEAVED
from jlora.families.reading import common

RELU2 = {"hidden_act": "relu2"}


def read(fields: Fields) -> Values:
    bias = fields.get("attention_bias", False)
    return common(fields, norm_eps=1e-5, activation=tuple(*RELU2.items())) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": fields.get("mlp_bias", False),
        "gated": False,
    }


FAMILY = Family(
    model_types=("arcee",),
    class_name="ArceeForCausalLM",
    read=read,
    names=Names(mlp_up=("up_proj",)),
    score="Arcee",
    gguf=Gguf("arcee", Reading(constants=RELU2), layouts=INTERLEAVED),
)
