"""PEFT's rules for the names in its configs. A module may have several names, one of which must match."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jlora.families import each
from jlora.families.family import SCORE

# The modules that "all-linear" leaves alone: those that compute logits or a reward model's score.
HEADS = (*each(lambda family: family.names.head), SCORE)


def matches(names: Sequence[str], pattern: str | Sequence[str]) -> bool:
    """The rule of `target_modules` and `exclude_modules`.

    A string is a regular expression for a whole name; the items of a sequence are whole names, or their last parts
    after a dot.
    """
    if isinstance(pattern, str):
        return any(re.fullmatch(pattern, name) for name in names)
    return any(name == item or name.endswith(f".{item}") for item in pattern for name in names)


def matches_key(names: Sequence[str], key: str) -> bool:
    """The rule of the keys of `rank_pattern` and `alpha_pattern`.

    A regular expression for a whole name, or for its last part after a dot.
    """
    return any(re.match(rf"(.*\.)?({key})$", name) for name in names)


def by_pattern(pattern: Mapping[str, Any] | Iterable[tuple[str, Any]], names: Sequence[str], default: Any) -> Any:
    """The value of the first key that matches, or `default`."""
    pairs = pattern.items() if isinstance(pattern, Mapping) else pattern
    return next((value for key, value in pairs if matches_key(names, key)), default)


def saves(names: Sequence[str], items: Iterable[str] | None) -> bool:
    """The rule of `modules_to_save`: only the end of a name counts."""
    return any(name.endswith(item) for item in items or () for name in names)


def in_layers(name: str, layers: Sequence[int] | None) -> bool:
    """The rule of `layers_to_transform`: whether the first number in the name is one of these; without any, True."""
    if not layers:
        return True
    number = re.search(r"\.(\d+)\.", name)
    return number is not None and int(number[1]) in layers


def targets(config: Any, names: Sequence[str], *, linear: bool) -> bool | None:
    """Whether a config adapts the module, one of PEFT's or a `LoraConfig`; None if it leaves that to PEFT's defaults.

    Args:
        names: the module's names, its own first.
        linear: whether it is a linear rather than an embedding.
    """
    if saves(names[:1], config.modules_to_save) or (config.exclude_modules and matches(names, config.exclude_modules)):
        return False
    if config.target_modules is None:
        return False if config.target_parameters else None
    if config.target_modules == "all-linear":
        return linear and names[0].rpartition(".")[2] not in HEADS
    return in_layers(names[0], config.layers_to_transform) and matches(names, config.target_modules)


def rank_of(config: Any, names: Sequence[str]) -> int:
    """The rank that a config gives the module."""
    return by_pattern(config.rank_pattern, names, config.r)


def scale_of(config: Any, names: Sequence[str]) -> float:
    """The scale that a config gives the module: alpha / r, or alpha / √r for rsLoRA (Kalajdzievski 2023)."""
    rank = rank_of(config, names)
    return by_pattern(config.alpha_pattern, names, config.lora_alpha) / (math.sqrt(rank) if config.use_rslora else rank)
