"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al. 2024): fused projections, part of each head rotated, LongRoPE."""

from collections.abc import Mapping
from typing import Any

from jlora.families.family import Family, Layer, Names, Older, Values
from jlora.families.fields import Fields
from jlora.families.gguf import WINDOW, Config, Gguf, Metadata, Reading, require_even_heads
from jlora.families.reading import common

ORIGINAL_LENGTH = 4096  # if config.json does not say


def read(fields: Fields) -> Values:
    rope = fields.rope()
    if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):  # older names of longrope
        fields = fields.replaced(rope_scaling=rope | {"rope_type": "longrope"})
    # transformers' class has an original length of its own, which it prefers to that of the rotary parameters.
    fields = fields.replaced(
        original_max_position_embeddings=fields.get("original_max_position_embeddings", ORIGINAL_LENGTH),
    )
    values = common(fields, norm_eps=1e-5, partial=fields.get("partial_rotary_factor", 1.0))
    return values | {"layers": (Layer(window=fields.get("sliding_window")),) * values["num_hidden_layers"]}


def older_scaling(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling` as transformers 4 accepts it: LongRoPE's type and its two lists only.

    Empty if there are other settings: transformers 5, which prefers `rope_scaling` to `rope_parameters`, would miss
    them.
    """
    names = ("max_position_embeddings", "original_max_position_embeddings")
    longest, original = (config.get(name) or ORIGINAL_LENGTH for name in names)
    given = {key: value for key, value in scaling.items() if value is not None}
    given.pop("original_max_position_embeddings", None)  # config.json's own takes precedence
    if given.get("factor") == longest / original:  # both versions compute the factor from these if none is given
        del given["factor"]
    kind = given.pop("rope_type")
    whole = kind == "longrope" and given.keys() == {"short_factor", "long_factor"}
    return {"type": kind, **given} if whole else {}


def from_gguf(metadata: Metadata, config: Config) -> Config:
    # Only part of a head may be rotated, so its size does not follow from rope.dimension_count.
    heads = config["num_attention_heads"]
    require_even_heads(metadata, config["hidden_size"], heads)
    return {"num_key_value_heads": metadata.number("attention.head_count_kv", heads)}


FAMILY = Family(
    model_types=("phi3",),
    class_name="Phi3ForCausalLM",
    read=read,
    names=Names(queries_keys_values=("qkv_proj",), mlp_up=("gate_up_proj",)),
    score="Phi3",
    older=Older(scaling=older_scaling),
    gguf=Gguf(
        "phi3",
        Reading(
            optional={**WINDOW, "original_max_position_embeddings": "rope.scaling.original_context_length"},
            share="partial_rotary_factor",
            more=from_gguf,
        ),
        writes={
            "rope.scaling.original_context_length": lambda config: config.ropes[0].original_max_position_embeddings
        },
    ),
)
