"""Mistral (Jiang et al. 2023): a window in every layer, unless `sliding_window` is null (as since v0.2)."""

from jlora.families import llama
from jlora.families.family import Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.gguf import WINDOW, Reading
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    fields.only("layer_types")
    values = common(fields, num_key_value_heads=8)
    return values | {"layers": (Layer(window=fields.get("sliding_window")),) * values["num_hidden_layers"]}


FAMILY = Family(
    model_types=("mistral",),
    class_name="MistralForCausalLM",
    read=read,
    score="Mistral",
    gguf=llama.FAMILY.gguf._replace(reading=Reading(optional=WINDOW, mark="attention.sliding_window")),
)
