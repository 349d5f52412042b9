"""Gemma 1 (Gemma team 2024): norms by 1 + weight, scaled embeddings."""

import math

from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.gguf import Gguf, Reading
from jlora.families.layouts import PLUS_ONE
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    values = read_common(fields, "hidden_act")
    # The first releases say "gelu" and mean the tanh approximation, as transformers takes it too.
    return values | ({"hidden_act": "gelu_pytorch_tanh"} if values["hidden_act"] == "gelu" else {})


def read_common(fields: Fields, activation: str, *, own_rope: bool = False) -> Values:
    """What the Gemmas read alike."""
    fields.only("use_bidirectional_attention", False)
    bias = fields.get("attention_bias", False)
    no_rope = dict.fromkeys(("rope_parameters", "rope_scaling", "rope_theta")) if own_rope else {}
    values = common(fields.replaced(**no_rope), head_dim=256, tied=True, activation=(activation, "gelu_pytorch_tanh"))
    return values | {
        "norm": "rms_plus_one",
        "qkv_bias": bias,
        "output_bias": bias,
        "embedding_scale": math.sqrt(values["hidden_size"]),
    }


FAMILY = Family(
    model_types=("gemma",),
    class_name="GemmaForCausalLM",
    read=read,
    score="Gemma",
    gguf=Gguf("gemma", Reading(constants={"hidden_act": "gelu_pytorch_tanh"}), layouts=PLUS_ONE, own_head=False),
)
