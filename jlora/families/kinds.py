"""The types and bounds of config.json's fields, checked before anything is computed from their values."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

LARGEST = 2**31 - 1  # the longest axis of an array
MOST = sys.float_info.max  # JSON may hold integers of any size
LAYERS, EXPERTS = 10_000, 100_000  # far more than any model has, far fewer than memory holds


class Kind(NamedTuple):
    """The values that a field may have: `holds` checks one, `what` describes them in messages."""

    what: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST <= value <= MOST


def whole(least: int, most: int) -> Kind:
    """The kind of the whole numbers from `least` to `most`, both included."""
    return Kind(
        f"a whole number from {least:,} to {most:,}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
    )


def list_of(kind: Kind, what: str) -> Kind:
    """The kind of the lists whose values are all of `kind`; `what` is its plural, for messages."""
    return Kind(f"a list of {what}", lambda value: isinstance(value, list) and all(map(kind.holds, value)))


NUMBER = Kind(  # JAX takes an integer among floats as one of 32 bits
    "a finite number", lambda value: _is_number(value) and (isinstance(value, float) or abs(value) <= LARGEST)
)
POSITIVE = Kind("a finite number above 0", lambda value: _is_number(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)))
TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NUMBERS = list_of(NUMBER, "numbers")
SIZE, LENGTH, TOKEN = whole(1, LARGEST), whole(0, LARGEST), whole(-1, LARGEST)  # some files have -1 for "none"

WHOLES = list_of(whole(0, LARGEST), "whole numbers")
WHOLES_OR_FLAGS = Kind(
    "a list of whole numbers or flags", lambda value: isinstance(value, list) and all(isinstance(v, int) for v in value)
)
TOKENS = Kind(f"{TOKEN.what}, or a list of them", lambda value: all(map(TOKEN.holds, _listed(value))))

# Field → its kind, for what several families read; the kind of a family's own field is given where it is read. A field
# that nothing reads may hold anything.
FIELDS: dict[str, Kind] = {
    name: kind
    for kind, names in (
        (SIZE, "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim"),
        (whole(1, LAYERS), "num_hidden_layers"),
        (whole(0, EXPERTS), "num_local_experts num_experts num_experts_per_tok"),
        (LENGTH, "sliding_window"),
        (POSITIVE, "max_position_embeddings original_max_position_embeddings rope_theta partial_rotary_factor"),
        (NUMBER, "rms_norm_eps"),
        (FLAG, "attention_bias mlp_bias tie_word_embeddings use_sliding_window"),
        (TEXT, "hidden_act hidden_activation"),
        (OBJECT, "rope_parameters rope_scaling"),
        (list_of(TEXT, "texts"), "layer_types"),
        (TOKENS, "eos_token_id"),
    )
    for name in names.split()
}
# The same for rotary parameters.
ROTARY: dict[str, Kind] = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    **dict.fromkeys(("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"), POSITIVE),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"), NUMBER),
    **dict.fromkeys(("mscale", "mscale_all_dim"), NUMBER),
    **dict.fromkeys(("short_factor", "long_factor"), NUMBERS),
    "truncate": FLAG,
}


def wrong(kind: Kind | None, name: str, value: Any) -> list[str]:
    """A line for the message if the value is not of its field's kind, else [].

    A field without a kind may hold anything, and null means absent.

    Args:
        name: what the message calls the value.
    """
    if value is None or kind is None or kind.holds(value):
        return []
    return [f"{name} is {short(value)}, expected {kind.what}"]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def short(value: Any) -> str:
    """The value as Python writes it, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
