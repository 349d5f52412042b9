"""Adapters of single experts: a pair of factors for each linear of each expert, instead of one pair for a whole layer.

So vLLM and SGLang read them, and so they were trained up to transformers 4, whose experts are modules of their own:
"….layers.N.mlp.experts.E.gate_proj.lora_A.weight" [R, D] and "….lora_B.weight" [F, R], and the same for up_proj and
down_proj, under each family's names (`Family.single_experts`). The router is a module among others then.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.errors import UserError, describe_faults
from jlora.families import FAMILIES, each
from jlora.families.family import ExpertNames
from jlora.hub.checkpoints.names import EXPERT_PARTS
from jlora.hub.checkpoints.source import open_description
from jlora.hub.checkpoints.weights import TensorInfo, read_tensors
from jlora.hub.peft.config import CONFIG, AdapterConfig, Summary
from jlora.hub.peft.experts import of_gpt_oss
from jlora.hub.peft.slots import PREFIX, Module, outermost
from jlora.lora.kinds import PRODUCT
from jlora.lora.kinds.kind import Leaf
from jlora.lora.kinds.product import A, B

SPELLINGS: tuple[ExpertNames, ...] = each(lambda family: family.single_experts)


class Single(NamedTuple):
    """The adapter of one expert's linear: its name as a module in the file's spelling, its rank and its scale."""

    name: str
    part: str
    expert: int
    rank: int
    scale: float


class Stacked(NamedTuple):
    """An adapter of single experts as if it were one of the stacked parameters.

    Attributes:
        config: has the stacked parameters as targets, with their ranks and scales.
        infos: the file's tensors, with those of stacked parameters in place of those of single experts.
        values: tensor → values, for those that are not in the file.
    """

    config: AdapterConfig
    infos: dict[str, TensorInfo]
    values: dict[str, np.ndarray]


def spelling_of(base: str | None) -> ExpertNames:
    """The names for adapters of single experts of the model at `base`.

    Raises:
        UserError: there is no `base`, or its family is unknown.
        FileNotFoundError: nothing is there.
    """
    kind = str(open_description(base).config.get("model_type")) if base else None
    if kind not in FAMILIES:
        found = f"model_type {kind}" if base else "none"
        raise UserError(
            "experts='each' names an adapter's tensors as the base's family does: base must be the folder or Hub id "
            f"of the base model; found {found}"
        )
    return FAMILIES[kind].single_experts


# ---------------------------------------------------------------- in


def stack_experts(
    file: Path,
    modules: list[Module],
    found: Mapping[str, TensorInfo],
    config: AdapterConfig,
    leaves: Mapping[str, Any],
) -> Stacked | None:
    """The file's adapter as one of the stacked parameters; None if it has no adapters of single experts.

    gate_proj A [R, D], B [F, R] and up_proj's of every expert → gate_up_proj A [E, 2R, D], B [E, 2F, 2R], where B is
    zero between the parts: each has its own half of the rank. If both have the same A, as `separate_experts` writes
    them, R is enough.

    Args:
        leaves: the base's.

    Raises:
        UserError: tensors are missing or misshapen; all are listed.
    """
    experts = {module.name: module for module in modules if module.site.experts and _last(module) in EXPERT_PARTS}
    spelling = next((s for s in SPELLINGS if any(_has(module, s, found) for module in experts.values())), None)
    if spelling is None:
        return None
    singles = {name: _singles(module, spelling, config, found) for name, module in experts.items()}
    singles = {name: parts for name, parts in singles.items() if parts}
    problems = [line for name, parts in singles.items() for line in _misfits(experts[name], parts, found)]
    if problems:
        raise UserError(describe_faults(f"{file} does not fit the model; nothing was loaded", sorted(problems)))
    taken = [_tensor(part.name, factor) for parts in singles.values() for part in parts for factor in (A, B)]
    read = read_tensors(file, taken)
    factors = {name: _joined(read, experts[name], parts, leaves) for name, parts in singles.items()}
    routers = _routers(modules, found, config)
    whole = _of_stacked(config, singles, {name: a.shape[-1] for name, (a, _) in factors.items()}, routers)
    infos, values = {name: info for name, info in found.items() if name not in read}, {}
    for module in outermost(modules, found, whole):
        for leaf, value in zip((A, B), factors.get(module.name, ()), strict=False):
            name, shape, codec = module.tensor(leaf, whole.rank(module.name))
            values[name], infos[name] = codec.to_file(value), TensorInfo(shape, "F32", file)
        if own := routers.get(module.name):
            for factor, value in read_tensors(file, [_tensor(own, A), _tensor(own, B)]).items():
                name = f"{module.tensors}{factor.removeprefix(PREFIX + own)}"
                values[name], infos[name] = value, infos.pop(factor)
    return Stacked(whole, infos, values)


def _of_stacked(
    config: AdapterConfig,
    singles: Mapping[str, list[Single]],
    ranks: Mapping[str, int],
    routers: Mapping[str, str],
) -> AdapterConfig:
    """The config with the stacked parameters and the routers' weights as targets, instead of modules."""
    alphas = {
        name: parts[0].scale * (math.sqrt(ranks[name]) if config.use_rslora else ranks[name])
        for name, parts in singles.items()
    }
    return dataclasses.replace(
        config,
        target_parameters=(*config.target_parameters, *singles, *routers),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()} | dict(config.rank_pattern),
        alpha_pattern={re.escape(name): alpha for name, alpha in alphas.items()} | dict(config.alpha_pattern),
    )


def _routers(modules: Sequence[Module], found: Mapping[str, TensorInfo], config: AdapterConfig) -> dict[str, str]:
    """Name of a router's weight → its name as a module in the file, for those that the file adapts as modules."""
    routers = {}
    for module in modules:
        if module.site.leaf == "router":
            for name in (_router(module, spelling) for spelling in SPELLINGS):
                if _tensor(name, A) in found and config.targets(name) is not False:
                    routers[module.name] = name
    return routers


def _joined(
    read: Mapping[str, np.ndarray], module: Module, parts: Sequence[Single], leaves: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """lora_a [E, D, R] and lora_b [E, R, N] of all experts and parts."""
    rank, order = parts[0].rank, list(dict.fromkeys(part.part for part in parts))
    first = {part.expert: read[_tensor(part.name, A)] for part in reversed(parts)}
    shared = all(np.array_equal(read[_tensor(part.name, A)], first[part.expert]) for part in parts)
    width = rank if shared else rank * len(order)
    a = np.zeros((module.site.experts, module.site.inputs, width), np.float32)
    b = np.zeros((module.site.experts, width, module.site.outputs), np.float32)
    for part in parts:
        start = 0 if shared else order.index(part.part) * rank
        ranks = slice(start, start + rank)
        a[part.expert, :, ranks] = read[_tensor(part.name, A)].T
        own = read[_tensor(part.name, B)].astype(np.float32).T
        own = own * (part.scale / parts[0].scale) if part.scale != parts[0].scale else own
        b[part.expert, ranks, _columns(module, part.part, leaves)] = own
    return a, b


def _singles(
    module: Module, spelling: ExpertNames, config: AdapterConfig, tensors: Mapping[str, TensorInfo]
) -> list[Single]:
    """The linears of the module's experts that the config targets; if it leaves that to PEFT, those in the file."""
    found = []
    for part, expert, name in _names(module, spelling):
        wanted = config.targets(name)
        if wanted or (wanted is None and _tensor(name, A) in tensors):
            found.append(Single(name, part, expert, config.rank(name), config.scale(name)))
    return found


def _misfits(module: Module, parts: list[Single], found: Mapping[str, TensorInfo]) -> list[str]:
    width = module.site.outputs // len(EXPERT_PARTS[_last(module)])
    problems = []
    for part in parts:
        if (part.rank, bool(part.scale)) != (parts[0].rank, bool(parts[0].scale)):
            problems.append(f"{part.name} has rank {part.rank}, others of its layer {parts[0].rank} ({CONFIG})")
        for factor, shape in ((A, (part.rank, module.site.inputs)), (B, (width, part.rank))):
            name = _tensor(part.name, factor)
            if name not in found:
                problems.append(f"missing {name} {shape}")
            elif found[name].shape != shape:
                problems.append(f"{name} has shape {found[name].shape}, expected {shape}")
    return problems


def _has(module: Module, spelling: ExpertNames, found: Mapping[str, TensorInfo]) -> bool:
    return any(_tensor(name, A) in found for _, _, name in _names(module, spelling))


# ---------------------------------------------------------------- out


def separate_experts(
    tensors: Mapping[str, np.ndarray],
    summary: Summary,
    modules: Sequence[Module],
    leaves: Mapping[str, Any],
    base: str | None,
) -> tuple[dict[str, np.ndarray], Summary]:
    """(tensors, summary) of the same adapter with experts one by one: the inverse of `stack_experts`.

    gate_proj and up_proj both get the A of gate_up_proj, and their part of its B.

    Args:
        tensors, summary: as PEFT has them now.
        base: the base model, whose family has names of its own.

    Raises:
        UserError: the adapter is not a LoRA, or `base` does not tell the family.
    """
    parameters = [module for module in modules if module.is_parameter]
    adapted = [module for module in parameters if module.name in summary.ranks]
    if not adapted:
        return dict(tensors), summary
    if summary.peft_type != PRODUCT.peft_type:
        raise UserError(f"experts='each': found an adapter of type {summary.peft_type}, expected LoRA")
    names = spelling_of(base)
    left, patterns = dict(tensors), {}
    for module in adapted:
        if module.site.experts:
            patterns[module.name] = _pattern(module, names)
            left |= dict(_separate(left, module, summary.ranks[module.name], names, leaves))
        else:
            patterns[module.name] = _router(module, names)
            left |= {_tensor(patterns[module.name], f): left.pop(f"{module.tensors}.{f.peft}") for f in (A, B)}
    routers = {module.name: _router(module, names) for module in parameters if not module.site.experts}
    return left, summary._replace(
        ranks={patterns.get(name, name): rank for name, rank in summary.ranks.items()},
        alphas={patterns.get(name, name): alpha for name, alpha in summary.alphas.items()},
        linears=[*summary.linears, *routers.values()],
        targets=[*summary.targets, *(routers[name] for name in summary.parameters if name in routers)],
        parameters=(),
        experts=_ends(parameters, summary, names),
    )


def _separate(
    tensors: dict[str, np.ndarray], module: Module, rank: int, names: ExpertNames, leaves: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of every expert's tensors; takes the stacked ones out of `tensors`."""
    (a_name, _, a_codec), (b_name, _, b_codec) = module.tensor(A, rank), module.tensor(B, rank)
    a, b = a_codec.from_file(tensors.pop(a_name)), b_codec.from_file(tensors.pop(b_name))
    for part, expert, name in _names(module, names):
        yield _tensor(name, A), a[expert].T
        yield _tensor(name, B), b[expert][:, _columns(module, part, leaves)].T


def _ends(parameters: Sequence[Module], summary: Summary, names: ExpertNames) -> list[str]:
    """What the names of the adapted experts' linears end in, and those of no other linears.

    These are "gate_proj", or "experts.0.gate_proj" and so on where other linears are called so; whole names if a
    parameter is adapted in some layers only.
    """
    others = {name.rpartition(".")[2] for name in {*summary.linears} - {*summary.targets}}
    ends = set()
    for last in EXPERT_PARTS:
        there = [module for module in parameters if module.site.experts and _last(module) == last]
        adapted = [module for module in there if module.name in summary.ranks]
        for part, expert, name in (found for module in adapted for found in _names(module, names)):
            own = getattr(names, part)
            short = own if own not in others and not summary.whole else f"experts.{expert}.{own}"
            ends.add(short if len(adapted) == len(there) else name)
    return sorted(ends)


# ---------------------------------------------------------------- names


def _names(module: Module, spelling: ExpertNames) -> list[tuple[str, int, str]]:
    """(part, expert, module's name in the file) for all linears that the stacked parameter holds."""
    owner = _spelled(module, spelling)
    return [
        (part, expert, f"{owner}.experts.{expert}.{getattr(spelling, part)}")
        for part in EXPERT_PARTS[_last(module)]
        for expert in range(module.site.experts)
    ]


def _pattern(module: Module, spelling: ExpertNames) -> str:
    """A pattern for the names of all linears that the stacked parameter holds."""
    parts = "|".join(getattr(spelling, part) for part in EXPERT_PARTS[_last(module)])
    return rf"{re.escape(_spelled(module, spelling))}\.experts\.\d+\.({parts})"


def _router(module: Module, spelling: ExpertNames) -> str:
    """The router's name as a module."""
    return f"{_spelled(module, spelling)}.{spelling.router or module.name.split('.')[-2]}"


def _spelled(module: Module, spelling: ExpertNames) -> str:
    """The name of what holds router and experts."""
    owner = ".".join(module.name.split(".")[:-2])
    return re.sub(r"(.*\.\d+)(\..+)?", rf"\1.{spelling.mixture}", owner) if spelling.mixture else owner


def _last(module: Module) -> str:
    return module.name.rpartition(".")[2]


def _columns(module: Module, part: str, leaves: Mapping[str, Any]) -> slice:
    """The part's columns among those of the stacked parameter."""
    every = EXPERT_PARTS[_last(module)]
    index, width = every.index(part), module.site.outputs // len(every)
    if of_gpt_oss(module, leaves):  # in alternate columns
        return slice(index, None, len(every))
    return slice(index * width, (index + 1) * width)


def _tensor(module: str, factor: Leaf) -> str:
    return f"{PREFIX}{module}.{factor.peft}"
