"""Reads rotary positions from config.json."""

import dataclasses
import math
from typing import Any

from jlora.families import kinds
from jlora.families.family import Rope
from jlora.families.fields import Fields

# rope_type → (needed, optional) parameters
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "proportional": ((), ("factor", "partial_rotary_factor")),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
}


def read_rope(
    fields: Fields, parameters: dict[str, Any], *, theta: float, head_dim: int, partial: float | None = None
) -> Rope:
    """The rotary positions that `rope_parameters` (transformers 5) or `rope_scaling` (4) describe.

    Args:
        parameters: the value of that field.
        theta: the base, unless `parameters` give it.
        partial: the share of a head that is rotated, unless `parameters` give it; None: the family rotates whole heads.
    """

    def read(name: str, default: Any = None) -> Any:
        return fields.of_kind(kinds.ROTARY.get(name), f"rotary parameter {name}", parameters.get(name), default)

    rope_type = read("rope_type", read("type", "default") if parameters.get("rope_type") is None else "default")
    longest = fields.get("max_position_embeddings", 2048)
    original = fields.get("original_max_position_embeddings", read("original_max_position_embeddings", longest))
    theta = float(read("rope_theta", theta))
    if partial is not None:
        dim = int(head_dim * read("partial_rotary_factor", partial))
    elif rope_type in ("default", "proportional"):
        # transformers then rotates whole heads, whatever the file says; some of them by nothing if "proportional"
        dim = head_dim
    else:
        dim = int(head_dim * read("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)))
        if dim != head_dim:
            fields.problems.append(
                f"rope_type {rope_type!r} with a partial_rotary_factor is not supported in this family, which rotates "
                "whole heads (nor does transformers compute it)"
            )
    if not 0 < dim <= head_dim or dim % 2:
        fields.problems.append(f"{dim} of a head's {head_dim} values are rotated; expected an even number of them")
    if rope_type not in ROPE_TYPES:
        fields.problems.append(f"rope_type {rope_type!r} is not supported (supported: {', '.join(ROPE_TYPES)})")
        return Rope(dim)
    needed, optional = ROPE_TYPES[rope_type]
    found = {name: value for name in (*needed, *optional) if (value := read(name)) is not None}
    fields.problems += [f"rope_type {rope_type!r} needs {name!r}" for name in needed if name not in found]
    if rope_type == "longrope":
        found |= {name: tuple(found.get(name, ())) for name in needed}
        found.setdefault("factor", longest / original)
        fields.problems += [
            f"rope_type 'longrope' needs {dim // 2} numbers in {name!r}, found {len(found[name])}"
            for name in needed
            if len(found[name]) != dim // 2
        ]
    found.setdefault("attention_factor", _attention_factor(rope_type, found, original))
    names = {field.name for field in dataclasses.fields(Rope)}
    return Rope(
        dim=dim,
        rope_theta=theta,
        rope_type=rope_type,
        original_max_position_embeddings=original,
        max_position_embeddings=longest,
        **{name: value for name, value in found.items() if name in names},
    )


def _attention_factor(rope_type: str, parameters: dict[str, Any], original: int) -> float:
    """What YaRN (Peng et al. 2023) and LongRoPE (Ding et al. 2024) multiply cos and sin by."""
    factor = parameters.get("factor", 1.0)
    if factor <= 1:
        return 1.0
    if rope_type == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if rope_type == "yarn":
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and all_dim:
            return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
        return 0.1 * math.log(factor) + 1
    return 1.0
