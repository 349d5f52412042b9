"""Gemma 4 12B: Gemma 4 without towers, whose language model reads images and sounds; no inputs of each layer."""

import dataclasses

from jlora.families import gemma2, gemma4
from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.multimodal import TextHalf, multimodal


def read(fields: Fields) -> Values:
    window = fields.get("sliding_window", 1024)
    return gemma4.read(fields.replaced(sliding_window=window, hidden_size_per_layer_input=0, enable_moe_block=None))


FAMILY: Family = dataclasses.replace(
    gemma4.FAMILY,
    model_types=("gemma4_unified_text",),
    class_name="Gemma4UnifiedForCausalLM",
    read=read,
    names=gemma2.NAMES,
    gguf=gemma4.GGUF._replace(reading=None),
)
MULTIMODAL = (
    multimodal(
        TextHalf(
            families=(FAMILY,),
            others=r"(model\.)?(embed_vision|vision_embedder|embed_audio)\..+",
            fields=gemma4.PERCEIVING,
        ),
        model_types=("gemma4_unified",),
        class_name="Gemma4UnifiedForConditionalGeneration",
    ),
)
