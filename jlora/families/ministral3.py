"""Ministral 3: Mistral with YaRN, and with queries that grow beyond the length that it was first trained at."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jlora.families.family import Family, Layer, QueryGrowth, Rope, Values
from jlora.families.fields import Fields
from jlora.families.gguf import SILU, Config, Gguf, Metadata, Reading
from jlora.families.kinds import NUMBER
from jlora.families.layouts import INTERLEAVED
from jlora.families.reading import common

# What transformers takes if config.json says nothing about rotary positions.
ROTARY = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
BETA = "llama_4_scaling_beta"


def read(fields: Fields) -> Values:
    fields.only("layer_types")
    parameters = fields.rope() or ROTARY
    values = common(
        fields.replaced(rope_parameters=parameters, rope_scaling=None),
        num_key_value_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        rope_theta=1e6,
    )
    return values | {
        "query_growth": read_growth(fields, parameters, values["ropes"][0]),
        "layers": (Layer(window=fields.get("sliding_window")),) * values["num_hidden_layers"],
    }


def read_growth(fields: Fields, parameters: dict[str, Any], rope: Rope) -> QueryGrowth | None:
    """How queries grow beyond the length that the model was first trained at.

    Args:
        parameters: the rotary parameters, which say how much.
    """
    beta = fields.of_kind(NUMBER, f"rotary parameter {BETA}", parameters.get(BETA), 0.0)
    return QueryGrowth(beta, rope.original_max_position_embeddings) if beta else None


# ---------------------------------------------------------------- GGUF

OVER, GROWTH = "rope.scaling.yarn_log_multiplier", "attention.temperature_scale"


def scaling(metadata: Metadata) -> Config:
    """How queries grow, and what YaRN's usual factor of cos and sin is divided by."""
    over = {"mscale": 1.0, "mscale_all_dim": metadata.get(OVER)} if metadata.get(OVER) else {}
    beta = metadata.get(GROWTH)
    return over | ({BETA: beta} if beta else {})


def log_multiplier(config: Any) -> float | None:
    """`mscale_all_dim`, if mscale is 1: of the factor of cos and sin, a quotient of two logarithms, the lower one's."""
    rope = config.ropes[0]
    if rope.rope_type != "yarn" or rope.factor <= 1:
        return None
    usual = 0.1 * math.log(rope.factor)
    found = ((usual + 1) / rope.attention_factor - 1) / usual
    return None if math.isclose(found, 0, abs_tol=1e-6) else found


WRITES: Mapping[str, Callable[[Any], Any]] = {
    GROWTH: lambda config: config.query_growth.beta if config.query_growth else None,
    OVER: log_multiplier,
    "rope.scaling.attn_factor": lambda config: None,
}

FAMILY = Family(
    model_types=("ministral3",),
    class_name="Ministral3ForCausalLM",
    read=read,
    score="Ministral3",
    gguf=Gguf(
        "mistral3",
        Reading(constants={**SILU, "rope_parameters": {"rope_type": "default"}}, scaling=scaling),
        writes=WRITES,
        layouts=INTERLEAVED,
    ),
)
