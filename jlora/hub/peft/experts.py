"""Adapters of experts' stacked parameters with A and B exchanged, as earlier versions of PEFT wrote them.

Up to PEFT 0.19.0 the adapter takes the parameters' axes in the wrong order, so that its A is what B is later; for
gpt-oss, which alone stores its experts' kernels as [E, in, out], that order is the right one.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.errors import UserError
from jlora.hub.checkpoints.weights import TensorInfo
from jlora.hub.peft.config import AdapterConfig
from jlora.hub.peft.slots import Module, is_wanted

FIXED = (0, 19, 1)  # the first PEFT version that takes the axes in the right order


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
    turned = any(of_gpt_oss(module, leaves) for module in wanted)
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


def of_gpt_oss(module: Module, leaves: Mapping[str, Any]) -> bool:
    """Whether the module is one of gpt-oss's experts.

    They alone have biases, kernels stored as [E, in, out], and gate and up in alternate columns.

    Args:
        leaves: the base's.
    """
    return f"{module.path}/bias" in leaves
