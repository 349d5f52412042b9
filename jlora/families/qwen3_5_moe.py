"""Qwen 3.5 with experts in every layer, alone or with its vision tower."""

import dataclasses

from jlora.families import qwen3_5, qwen3_next
from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.gguf import DECODER, EXPERTS, SILU, Config, Gguf, Metadata, Reading
from jlora.families.multimodal import TextHalf, multimodal
from jlora.families.qwen3_5 import ONLY_SEEING, OTHERS
from jlora.families.qwen3_next import FAMILY as NEXT
from jlora.families.qwen3_next import read_common, read_experts


def read(fields: Fields) -> Values:
    # There is no field for the width of dense layers, of which there are none.
    width = fields.get("moe_intermediate_size", 512)
    values = read_common(fields.replaced(intermediate_size=width), fused=False)
    layers = tuple(layer._replace(experts=True) for layer in values["layers"])
    return values | {"experts": read_experts(fields, normalize=True), "layers": layers}


def from_gguf(metadata: Metadata, config: Config) -> Config:
    metadata.get("feed_forward_length")  # known, but of no use: no layer is dense
    return qwen3_5.from_gguf(metadata, config)


SIZES = {name: key for name, key in DECODER.items() if name != "intermediate_size"}
FAMILY: Family = dataclasses.replace(
    NEXT,
    model_types=("qwen3_5_moe_text",),
    class_name="Qwen3_5MoeForCausalLM",
    read=read,
    score=None,
    gguf=Gguf(
        "qwen35moe",
        Reading(
            required={**SIZES, **qwen3_next.DELTA_SIZES, **qwen3_next.EXPERT_SIZES},
            constants=SILU,
            more=from_gguf,
            share=qwen3_next.SHARE,
        ),
        writes={**qwen3_5.WRITES, **qwen3_next.WRITES_EXPERTS},
        modules={**qwen3_5.MODULES, **EXPERTS, **qwen3_next.SHARED},
        layouts=qwen3_5.LAYOUTS,
        joined=(qwen3_next.SHARED_GATE, *qwen3_5.JOINED),
    ),
)

MULTIMODAL = (
    multimodal(
        TextHalf(families=(FAMILY,), others=OTHERS, fields=ONLY_SEEING, tied=False),
        model_types=("qwen3_5_moe",),
        class_name="Qwen3_5MoeForConditionalGeneration",
    ),
)
