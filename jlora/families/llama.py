"""Llama 1 to 3.3 (Touvron et al. 2023)."""

from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.gguf import BIASES, Gguf, Reading
from jlora.families.layouts import INTERLEAVED
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    bias = fields.get("attention_bias", False)
    return common(fields) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": fields.get("mlp_bias", False),
    }


FAMILY = Family(
    model_types=("llama",),
    class_name="LlamaForCausalLM",
    read=read,
    score="Llama",
    gguf=Gguf("llama", Reading(biases=BIASES), layouts=INTERLEAVED, all_biases=True),
)
