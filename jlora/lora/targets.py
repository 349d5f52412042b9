"""Which modules a LoraConfig adapts, and with what rank and scale: PEFT's matching rules over the Hub's dotted
names.
"""

import dataclasses
import math
import re
from typing import Any

from jlora import tree
from jlora.lora.config import LoraConfig

HEADS = ("lm_head", "embed_out")
# What Hugging Face's causal-LM classes put before a module's own name; a pattern may be written with it or without.
HUB_PREFIXES = ("", "model.", "transformer.", "gpt_neox.")


@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted linear: its path, and a rank (0: left alone) and scale for each layer of its stack, or one of
    each.
    """

    path: str
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    stacked: bool


def find_targets(params: dict, config: LoraConfig) -> list[Target]:
    """The linears of `params` that `config` adapts.

    Raises:
        ValueError: a target, an exclusion or a pattern that matches no linear (all are listed, with the linears there
        are).
    """
    kernels = {
        path.removesuffix("/kernel"): leaf
        for path, leaf in tree.flatten(params).items()
        if path.endswith("/kernel") and not is_expert(path)
    }
    names = {path: module_names(path, leaf) for path, leaf in kernels.items()}
    every_name = [name for stack in names.values() for name in stack]
    _require_matches(config, every_name)
    targets = []
    for path, stack in names.items():
        settings = [_settings(name, path, config) for name in stack]
        if any(rank for rank, _ in settings):
            ranks, scales = zip(*settings, strict=True)
            targets.append(Target(path, ranks, scales, tree.stack_of(path) is not None))
    if not targets:
        raise ValueError(
            f"target_modules={config.target_modules!r} selects no linear; there are {', '.join(sorted(names))}"
        )
    return targets


def is_expert(path: str) -> bool:
    """Whether the leaf or module at `path` is a kernel of experts, which is no linear to PEFT."""
    return "/experts/" in path


def module_names(path: str, kernel: Any) -> list[str]:
    """The dotted names of a module, one a layer: layers/self_attn/q_proj → layers.0.self_attn.q_proj, layers.1.…"""
    stack = tree.stack_of(path)
    if stack is None:
        return [path.replace("/", ".")]
    name, rest = stack.name.replace("/", "."), stack.rest.replace("/", ".")
    return [f"{name}.{layer}.{rest}" for layer in stack.indices(kernel.shape[0])]


def matches(name: str, pattern: str | tuple[str, ...]) -> bool:
    """PEFT's rule for target_modules and exclude_modules: a tuple matches by suffix, a string by full regular
    expression.
    """
    if isinstance(pattern, str):
        return any(re.fullmatch(pattern, prefix + name) for prefix in HUB_PREFIXES)
    return any(full == item or full.endswith("." + item) for item in pattern for full in _with_prefixes(name))


def _with_prefixes(name: str) -> list[str]:
    return [prefix + name for prefix in HUB_PREFIXES]


def _matches_suffix(name: str, key: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern keys."""
    return any(re.match(rf"(.*\.)?({key})$", full) for full in _with_prefixes(name))


def _settings(name: str, path: str, config: LoraConfig) -> tuple[int, float]:
    """Rank and scale of one module; rank 0 when it is not adapted."""
    everything = config.target_modules == "all-linear"
    wanted = path.split("/")[-1] not in HEADS if everything else matches(name, config.target_modules)
    if not wanted or (config.exclude_modules is not None and matches(name, config.exclude_modules)):
        return 0, 0.0
    rank = next((value for key, value in config.rank_pattern if _matches_suffix(name, key)), config.r)
    alpha = next((value for key, value in config.alpha_pattern if _matches_suffix(name, key)), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _require_matches(config: LoraConfig, names: list[str]) -> None:
    problems = []
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        items = (
            []
            if pattern in (None, "all-linear")
            else [pattern]
            if isinstance(pattern, str)
            else [(p,) for p in pattern]
        )
        problems += [f"{field} {item!r}" for item in items if not any(matches(name, item) for name in names)]
    for field in ("rank_pattern", "alpha_pattern"):
        keys = [key for key, _ in getattr(config, field)]
        problems += [f"{field} {key!r}" for key in keys if not any(_matches_suffix(name, key) for name in names)]
    if problems:
        last = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            "these match no linear of the model:\n  "
            + "\n  ".join(problems)
            + f"\nthe model's linears end in: {', '.join(last)}"
        )
