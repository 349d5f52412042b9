"""Granite 3: Llama with four factors."""

from jlora.families import llama
from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.gguf import BIASES, DECODER, Config, Gguf, Metadata, Reading, heads
from jlora.families.kinds import NUMBER, POSITIVE
from jlora.families.layouts import INTERLEAVED


def read(fields: Fields) -> Values:
    return llama.read(fields) | {
        "embedding_scale": float(fields.get("embedding_multiplier", 1.0, NUMBER)),
        "residual_scale": float(fields.get("residual_multiplier", 1.0, NUMBER)),
        "logits_divisor": float(fields.get("logits_scaling", 1.0, POSITIVE)),
        "attention_scale": float(fields.get("attention_multiplier", 1.0, NUMBER)),
    }


def from_gguf(metadata: Metadata, config: Config) -> Config:
    # Only for Granite does this key say whether positions are rotated at all.
    metadata.only("rope.scaling.finetuned", True)
    return heads(metadata, config)


FAMILY = Family(
    model_types=("granite",),
    class_name="GraniteForCausalLM",
    read=read,
    gguf=Gguf(
        "granite",
        Reading(
            required={**DECODER, "attention_multiplier": "attention.scale", "logits_scaling": "logit_scale"},
            optional={"embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale"},
            biases=BIASES,
            more=from_gguf,
        ),
        writes={
            "attention.scale": lambda config: config.attention_scale,
            "embedding_scale": lambda config: config.embedding_scale,
            "residual_scale": lambda config: config.residual_scale,
            "logit_scale": lambda config: config.logits_divisor,
        },
        layouts=INTERLEAVED,
        all_biases=True,
    ),
)
