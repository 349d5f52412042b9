"""Adapters of experts' stacked parameters with A and B exchanged, as earlier versions of PEFT wrote them.

Up to PEFT 0.19.0 the adapter takes the parameters' axes in the wrong order, so that its A is what B is later. gpt-oss
alone stores its experts' kernels as [E, in, out], for which that order is the right one; PEFT 0.19.0 turned just these.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.errors import UserError
from jlora.hub.checkpoints.weights import TensorInfo
from jlora.hub.peft.config import PEFT_VERSION, AdapterConfig
from jlora.hub.peft.slots import Module, is_wanted

FIXED = (0, 19, 1)  # the first PEFT version that takes the axes in the right order
TURNED = (0, 19, 0)  # the one that takes those of gpt-oss in the wrong order
FIRST = "0.17.0"  # adapts parameters; the version itself is written since 0.18


def exchanged(
    modules: list[Module],
    found: Mapping[str, TensorInfo],
    config: AdapterConfig,
    path: Path,
    leaves: Mapping[str, Any],
) -> list[Module]:
    """The modules, with experts marked as exchanged if the file has their A and B the other way round.

    The version of PEFT decides; a file without one is taken for 0.17's.

    Args:
        leaves: the base's.

    Raises:
        UserError: the version is malformed, or the shapes fit only the order that it does not have.
    """
    wanted = [module for module in modules if module.site.experts and is_wanted(module, found, config)]
    if not wanted:
        return modules
    turned = any(of_gpt_oss(module, leaves) for module in wanted)
    swapped = _swaps(config, path, turned=turned)
    fits = {module.name: _fits(module, found, config) for module in wanted}
    if any(fit == (swapped, not swapped) for fit in fits.values()):
        raise UserError(_contradiction(config, path, swapped=swapped, turned=turned))
    if config.peft_version is None and not turned and any(all(fit) for fit in fits.values()):
        warnings.warn(
            f"{path}: peft_version is missing, as in PEFT 0.17, so the experts' A and B are assumed to be swapped, as "
            f"they are before 0.19.1. {_remedy(swapped=False, turned=turned)}",
            stacklevel=3,
        )
    return [module._replace(exchanged=swapped) if module in wanted else module for module in modules]


def _swaps(config: AdapterConfig, path: Path, *, turned: bool) -> bool:
    """Whether that version of PEFT exchanges A and B.

    Args:
        turned: whether the kernels are stored as [E, in, out].
    """
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", FIRST if config.peft_version is None else str(config.peft_version))
    if not match:
        raise UserError(
            f"{path}: peft_version is {config.peft_version!r}, expected a version of PEFT such as {PEFT_VERSION}"
        )
    version = tuple(map(int, match.groups()))
    return version == TURNED if turned else version < FIXED


def _contradiction(config: AdapterConfig, path: Path, *, swapped: bool, turned: bool) -> str:
    version = "missing, as in PEFT 0.17" if config.peft_version is None else config.peft_version
    return (
        f"{path}: peft_version is {version}, by which the experts' A and B are {'' if swapped else 'not '}swapped, but "
        f"their shapes fit only if they are {'not ' if swapped else ''}; nothing was loaded. "
        f"{_remedy(swapped=not swapped, turned=turned)}"
    )


def _remedy(*, swapped: bool, turned: bool) -> str:
    """What to do if A and B are in the other order."""
    version = PEFT_VERSION if not swapped else ".".join(map(str, TURNED)) if turned else "0.18.0"
    order = "swapped" if swapped else "not swapped"
    return (
        f'If they are {order}, say so in the file ("peft_version": "{version}"), or by load_adapter(…, peft_version=…)'
    )


def _fits(module: Module, found: Mapping[str, TensorInfo], config: AdapterConfig) -> tuple[bool, bool]:
    """(whether the module's tensors have the shapes of the right order, and those of the wrong one)."""
    rank = config.rank(module.name)
    right, wrong = (
        all(name in found and found[name].shape == shape for name, shape, _ in form.tensors_of(config, rank).values())
        for form in (module, module._replace(exchanged=True))
    )
    return right, wrong


def of_gpt_oss(module: Module, leaves: Mapping[str, Any]) -> bool:
    """Whether the module is one of gpt-oss's experts.

    They alone have biases, kernels stored as [E, in, out], and gate and up in alternate columns.

    Args:
        leaves: the base's.
    """
    return f"{module.path}/bias" in leaves
