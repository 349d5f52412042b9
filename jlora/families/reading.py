"""What many families read alike from config.json."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jlora.errors import number_of
from jlora.families.family import Layer, Values
from jlora.families.fields import Fields
from jlora.families.kinds import Kind
from jlora.families.rope import read_rope


def common(
    fields: Fields,
    *,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
    partial: float | None = None,
    tied: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
) -> Values:
    """The values that nearly all families read alike; the arguments are the defaults of their transformers configs."""
    width, heads = fields.require("hidden_size"), fields.require("num_attention_heads")
    if fields.get("head_dim", head_dim) is None and width % heads:
        fields.problems.append(
            f"hidden_size {width} is not a multiple of num_attention_heads {heads}, and head_dim is not given"
        )
    head_dim = fields.get("head_dim", head_dim or width // heads or 1)
    values = sizes(fields, heads=heads, head_dim=head_dim, num_key_value_heads=num_key_value_heads)
    rope = fields.rope()
    theta = fields.get("rope_theta", rope_theta)
    return values | {
        "hidden_size": width,
        "intermediate_size": fields.require("intermediate_size"),
        "num_hidden_layers": fields.require("num_hidden_layers"),
        "norm_eps": fields.get("rms_norm_eps", norm_eps),
        "max_position_embeddings": fields.get("max_position_embeddings", 2048),
        "tie_word_embeddings": fields.get("tie_word_embeddings", tied),
        "hidden_act": fields.get(*activation),
        "attention_scale": head_dim**-0.5,
        "ropes": (read_rope(fields, rope, theta=theta, head_dim=head_dim, partial=partial),),
        "layers": (Layer(),) * fields.require("num_hidden_layers"),
    }


def interleaved(values: Values) -> Values:
    """The values with rotations of neighbouring values rather than of a head's two halves."""
    return values | {"ropes": tuple(dataclasses.replace(rope, interleaved=True) for rope in values["ropes"])}


def nullable(fields: Fields, name: str, default: float | int, kind: Kind) -> Any:
    """The field's value, for fields where null means none and only absence means the default."""
    return fields.get(name, None if name in fields.config else default, kind)


def sizes(fields: Fields, *, heads: int, head_dim: int, num_key_value_heads: int | None) -> Values:
    """The sizes of vocabulary and heads, checked."""
    groups = fields.get("num_key_value_heads", num_key_value_heads or heads)
    if heads % groups:
        fields.problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    return {
        "vocab_size": fields.require("vocab_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }


def read_windows(fields: Fields, window: int | None, count: int, default: Callable[[], list[bool]]) -> list[int | None]:
    """The window of every layer, by `layer_types`.

    Args:
        default: which layers have a window if `layer_types` is absent.
    """
    kinds = fields.get("layer_types")
    if kinds is None:
        return [window if has else None for has in default()]
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        fields.problems.append(f"layer_types: {', '.join(unknown)} is not supported")
    require_length(fields, "layer_types", kinds, count)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def require_length(fields: Fields, name: str, values: list, count: int) -> None:
    if len(values) != count:
        fields.problems.append(f"{name} has {number_of(len(values), 'value')} for {number_of(count, 'layer')}")
