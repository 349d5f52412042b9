"""Valid values of the fields of adapter_config.json, for all PEFT methods that jlora reads."""

import re
from collections.abc import Mapping
from typing import Any

from jlora.families.kinds import FLAG, LARGEST, NUMBER, OBJECT, TEXT, Kind, list_of, short, whole

COUNT, TOKENS = whole(1, LARGEST), list_of(whole(0, LARGEST), "token ids")
SHARE = Kind("a number from 0 to 1", lambda value: NUMBER.holds(value) and 0 <= value <= 1)
NAMES = list_of(TEXT, "names")


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return isinstance(value, str)


def _by_name(kind: Kind) -> Kind:
    return Kind(
        f"an object that gives names, or regular expressions of them, {kind.what}",
        lambda value: OBJECT.holds(value) and all(map(_is_pattern, value)) and all(map(kind.holds, value.values())),
    )


PATTERN = Kind("a regular expression of names, or a list of names", lambda v: _is_pattern(v) or NAMES.holds(v))
LAYERS = whole(0, LARGEST)

# Field → its kind, unless the field is absent, null, false or empty, which all mean that it is not used.
FIELDS: dict[str, Kind] = {
    "target_modules": PATTERN,
    "exclude_modules": PATTERN,
    "feedforward_modules": PATTERN,
    "modules_to_save": NAMES,
    "target_parameters": NAMES,
    "layers_to_transform": Kind(
        "the number of a layer, or a list of them",
        lambda value: LAYERS.holds(value) or (isinstance(value, list) and all(map(LAYERS.holds, value))),
    ),
    "trainable_token_indices": Kind(
        "a list of token ids, or an object that gives modules such lists",
        lambda value: TOKENS.holds(value) or (OBJECT.holds(value) and all(map(TOKENS.holds, value.values()))),
    ),
    "rank_pattern": _by_name(COUNT),
    "alpha_pattern": _by_name(NUMBER),
    "bias": Kind("'none', 'all' or 'lora_only'", lambda value: value in ("none", "all", "lora_only")),
    "lora_dropout": SHARE,
    "peft_version": TEXT,
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying", "decompose_both"), FLAG),
}
NEEDED: dict[str, Kind] = {"r": COUNT, "lora_alpha": NUMBER, "alpha": NUMBER}


def wrong_fields(found: Mapping[str, Any], needed: tuple[str, ...]) -> list[str]:
    """A line for each `needed` field that is missing, and for each field whose value is not of its kind."""
    problems = [
        f"{name} is {short(found.get(name))}, expected {NEEDED[name].what}"
        for name in needed
        if not NEEDED[name].holds(found.get(name))
    ]
    return problems + [
        f"{name} is {short(found[name])}, expected {kind.what}"
        for name, kind in FIELDS.items()
        if found.get(name) and not kind.holds(found[name])
    ]
