"""FlexOlmo: OLMo 2 with experts in every layer."""

import dataclasses

from jlora.families import olmo2, olmoe
from jlora.families.family import Values
from jlora.families.fields import Fields


def read(fields: Fields) -> Values:
    values = olmo2.read(fields, norm_eps=1e-6, rope_theta=5e5)
    return values | olmoe.read_experts(fields, values, count=7, top_k=5)


FAMILY = dataclasses.replace(
    olmo2.FAMILY, model_types=("flex_olmo",), class_name="FlexOlmoForCausalLM", read=read, score=None, gguf=None
)
