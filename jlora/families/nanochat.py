"""nanochat: norms without weights everywhere, after the embedding too; rotations backwards; a squared ReLU."""

import dataclasses

from jlora.families.arcee import RELU2
from jlora.families.family import Family, Names, Values
from jlora.families.fields import Fields
from jlora.families.kinds import NUMBER
from jlora.families.reading import common, nullable


def read(fields: Fields) -> Values:
    bias = fields.get("attention_bias", False)
    values = common(fields, activation=tuple(*RELU2.items()))
    return values | {
        "norm": "rms_bare",
        "qk_norm": "rotated",
        "embedding_norm": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "gated": False,
        "final_softcap": nullable(fields, "final_logit_softcapping", 15.0, NUMBER),
        "ropes": tuple(dataclasses.replace(rope, clockwise=True) for rope in values["ropes"]),
    }


FAMILY = Family(
    model_types=("nanochat",),
    class_name="NanoChatForCausalLM",
    read=read,
    names=Names(norm=None, mlp_up=("fc1",), mlp_down="fc2"),
)
