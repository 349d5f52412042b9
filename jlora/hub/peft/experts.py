"""Adapters of experts as earlier versions wrote them: one expert at a time, or with A and B exchanged.

Up to transformers 4 each expert of a mixture has its own linears, and these have their own adapters. Up to PEFT 0.19.0
the adapter of the experts' stacked parameters takes their axes in the wrong order, so that its A is what B is later;
for gpt-oss, which alone stores its experts' kernels as [E, in, out], that order is the right one.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.errors import UserError, describe_faults
from jlora.hub.checkpoints.names import EXPERT_PARTS
from jlora.hub.checkpoints.weights import TensorInfo, read_tensor
from jlora.hub.peft.config import CONFIG, AdapterConfig
from jlora.hub.peft.slots import PREFIX, Module, is_wanted
from jlora.lora.kinds.kind import Leaf
from jlora.lora.kinds.product import A, B

FIXED = (0, 19, 1)  # the first PEFT version that takes the axes in the right order
# Other names of a mixture's modules: transformers 4 names Mixtral's as its checkpoints do.
SPELLINGS: tuple[Mapping[str, str], ...] = (
    {"mlp": "mlp", "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)


class Single(NamedTuple):
    """The adapter of one expert's linear: its name as a module in the file's spelling, its rank and its scale."""

    name: str
    part: str
    expert: int
    rank: int
    scale: float


class OneByOne(NamedTuple):
    """An adapter of single experts.

    Attributes:
        config: the config with the stacked parameters as targets, and their ranks and scales.
        singles: name of a stacked parameter → the adapters of its experts, by part and expert.
        routers: module → its name in the file's spelling.
    """

    config: AdapterConfig
    singles: Mapping[str, list[Single]]
    routers: Mapping[str, str]


# ---------------------------------------------------------------- A and B exchanged


def exchanged(
    modules: list[Module],
    found: Mapping[str, TensorInfo],
    config: AdapterConfig,
    path: Path,
    leaves: Mapping[str, Any],
) -> list[Module]:
    """The modules, with experts marked as exchanged if the file has their A and B the other way round.

    The shapes decide; if they fit both ways (a model twice as wide as its experts), the PEFT version does.

    Args:
        leaves: the base's.

    Raises:
        UserError: the version is malformed.
    """
    wanted = [module for module in modules if module.site.experts and is_wanted(module, found, config)]
    fits = {_fits(module, found, config) for module in wanted}
    certain = fits - {(True, True)}
    if not wanted or len(certain) > 1 or (False, False) in fits:  # `check_fits` names tensors that fit neither
        return modules
    turned = any(f"{module.path}/bias" in leaves for module in wanted)  # only gpt-oss's experts have biases
    swapped = certain.pop() == (False, True) if certain else not turned and _is_old(config, path)
    return [module._replace(exchanged=swapped) if module in wanted else module for module in modules]


def _fits(module: Module, found: Mapping[str, TensorInfo], config: AdapterConfig) -> tuple[bool, bool]:
    """(whether the module's tensors have the shapes of the right order, and those of the wrong one)."""
    rank = config.rank(module.name)
    right, wrong = (
        all(name in found and found[name].shape == shape for name, shape, _ in form.tensors_of(config, rank).values())
        for form in (module, module._replace(exchanged=True))
    )
    return right, wrong


def _is_old(config: AdapterConfig, path: Path) -> bool:
    if config.peft_version is None:  # PEFT has written it since 0.18 and adapted parameters since 0.17
        warnings.warn(
            f"{path}: peft_version is missing, as in PEFT 0.17, so the experts' A and B are assumed to be swapped, as "
            'they are before 0.19.1; if a later version wrote the file, add it ("peft_version": "0.21.2")',
            stacklevel=4,
        )
        return True
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.peft_version))
    if not match:
        raise UserError(f"{path}: peft_version is {config.peft_version!r}, expected a version of PEFT such as 0.21.2")
    return tuple(map(int, match.groups())) < FIXED


# ---------------------------------------------------------------- one by one


def find_one_by_one(
    file: Path, modules: list[Module], found: Mapping[str, TensorInfo], config: AdapterConfig
) -> OneByOne | None:
    """The file's adapters of single experts; None if it has none.

    Raises:
        UserError: tensors are missing or misshapen; all are listed.
    """
    stacked = {module.name: module for module in modules if module.site.experts}
    spelling = next((s for s in SPELLINGS if any(_single_names(m, s) & found.keys() for m in stacked.values())), None)
    if spelling is None:
        return None
    singles = {name: _singles(module, spelling, config, found) for name, module in stacked.items()}
    singles = {name: parts for name, parts in singles.items() if parts}
    problems = [line for name, parts in singles.items() for line in _misfits(stacked[name], parts, found)]
    if problems:
        raise UserError(describe_faults(f"{file} does not fit the model; nothing was loaded", sorted(problems)))
    routers = {
        module.name.removesuffix(".weight"): _spelled(module.name.removesuffix(".weight"), spelling)
        for module in modules
        if module.site.leaf == "router"
    }
    routers = {name: own for name, own in routers.items() if config.targets(own) is not False}
    routers = {name: own for name, own in routers.items() if _tensor(own, A) in found}
    ranks = {name: _rank(parts) for name, parts in singles.items()}
    alphas = {
        name: parts[0].scale * (math.sqrt(ranks[name]) if config.use_rslora else ranks[name])
        for name, parts in singles.items()
    }
    parameters = (*config.target_parameters, *singles, *(f"{name}.weight" for name in routers))
    whole = dataclasses.replace(
        config,
        target_parameters=parameters,
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()} | dict(config.rank_pattern),
        alpha_pattern={re.escape(name): alpha for name, alpha in alphas.items()} | dict(config.alpha_pattern),
    )
    return OneByOne(whole, singles, routers)


def stack_experts(
    file: Path, modules: list[Module], found: Mapping[str, TensorInfo], plan: OneByOne
) -> tuple[dict[str, TensorInfo], dict[str, np.ndarray]]:
    """(the file's tensors as if it held adapters of the stacked parameters, the values of those adapters).

    gate_proj A [R, D], B [F, R] and up_proj's of every expert → gate_up_proj A [E, 2R, D], B [E, 2F, 2R], where B is
    zero between the parts: each has its own half of the rank.

    Args:
        modules: the modules, with their tensors named as PEFT does now.
    """
    infos, values = dict(found), {}
    for module in modules:
        if parts := plan.singles.get(module.name):
            a, b = _stacked(file, module, parts)
            for part in parts:
                for factor in (A, B):
                    infos.pop(_tensor(part.name, factor))
            for leaf, value in ((A, a), (B, b)):
                name, shape, codec = module.tensor(leaf, _rank(parts))
                values[name], infos[name] = codec.to_file(value), TensorInfo(shape, "F32", file)
        own = plan.routers.get(module.name.removesuffix(".weight"))
        if module.site.leaf == "router" and own is not None:
            for factor in (A, B):
                old, new = _tensor(own, factor), f"{module.tensors}.{factor.peft}"
                infos[new] = infos.pop(old)
                values[new] = read_tensor(file, old)
    return infos, values


def _stacked(file: Path, module: Module, parts: list[Single]) -> tuple[np.ndarray, np.ndarray]:
    """lora_a [E, D, R] and lora_b [E, R, N] of all experts and parts."""
    order = list(dict.fromkeys(part.part for part in parts))
    every = EXPERT_PARTS[module.name.rpartition(".")[2]]
    width, rank = module.site.outputs // len(every), parts[0].rank
    a = np.zeros((module.site.experts, module.site.inputs, rank * len(order)), np.float32)
    b = np.zeros((module.site.experts, rank * len(order), module.site.outputs), np.float32)
    for part in parts:
        ranks = slice(order.index(part.part) * rank, (order.index(part.part) + 1) * rank)
        columns = slice(every.index(part.part) * width, (every.index(part.part) + 1) * width)
        a[part.expert, :, ranks] = read_tensor(file, _tensor(part.name, A)).T
        own = read_tensor(file, _tensor(part.name, B)).astype(np.float32).T
        b[part.expert, ranks, columns] = own * (part.scale / parts[0].scale if part.scale != parts[0].scale else 1)
    return a, b


def _singles(
    module: Module, spelling: Mapping[str, str], config: AdapterConfig, tensors: Mapping[str, TensorInfo]
) -> list[Single]:
    """The linears of the module's experts that the config targets; if it leaves that to PEFT, those in the file."""
    found = []
    for part, expert, name in _names(module, spelling):
        wanted = config.targets(name)
        if wanted or (wanted is None and _tensor(name, A) in tensors):
            found.append(Single(name, part, expert, config.rank(name), config.scale(name)))
    return found


def _misfits(module: Module, parts: list[Single], found: Mapping[str, TensorInfo]) -> list[str]:
    width = module.site.outputs // len(EXPERT_PARTS[module.name.rpartition(".")[2]])
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


def _rank(parts: list[Single]) -> int:
    return parts[0].rank * len({part.part for part in parts})


def _names(module: Module, spelling: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """(part, expert, module's name in the file) for all linears that the stacked parameter holds."""
    owner, _, last = module.name.rpartition(".")
    return [
        (part, expert, f"{_spelled(owner, spelling)}.{expert}.{spelling[part]}")
        for part in EXPERT_PARTS[last]
        for expert in range(module.site.experts)
    ]


def _single_names(module: Module, spelling: Mapping[str, str]) -> set[str]:
    return {_tensor(name, A) for _, _, name in _names(module, spelling)}


def _spelled(name: str, spelling: Mapping[str, str]) -> str:
    return name.replace(".mlp.", f".{spelling['mlp']}.", 1)


def _tensor(module: str, factor: Leaf) -> str:
    return f"{PREFIX}{module}.{factor.peft}"
