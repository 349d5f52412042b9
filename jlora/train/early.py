"""What can be wrong with a run's surroundings, found before its model is loaded: folders, packages, signatures."""

import os
import pathlib
from collections.abc import Callable, Iterable

from jlora.errors import ExistingFileError, UserError, raise_all
from jlora.hub.adapters import check_adapter
from jlora.kernels import attention
from jlora.kernels.device import target
from jlora.train.config import RunConfig
from jlora.types import require


def check_surroundings(config: RunConfig, workdir: pathlib.Path) -> None:
    """Raises UserError for adapters that cannot be opened, packages that are missing, a form of attention that does
    not run here, and a workdir that cannot be written; all in one message. Nothing is written.
    """
    runs = config.members().values() if config.adapters else [config]
    adapters = {one.model.adapter: "model.adapter" for one in runs if one.model.adapter}
    if config.rollout.reward_model:
        adapters[config.rollout.reward_model] = "rollout.reward_model"
    checks: list[tuple[str, Callable[[], object]]] = [
        (f"{setting}: ", lambda path=path: check_adapter(path)) for path, setting in adapters.items()
    ]
    checks.append(("", lambda: check_writable(workdir)))
    checks.append(("model.attention: ", lambda: attention.require(config.model.attention, target())))
    if config.train.tensorboard:
        checks.append(("train.tensorboard: ", lambda: require("tensorboardX", "tensorboard")))
    raise_all(_faults(checks))


def check_writable(folder: pathlib.Path) -> None:
    """Raises UserError when a folder cannot be made or written in."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise ExistingFileError(f"{there} is a file; expected a folder to work in, or a place to make {folder}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} cannot be written in, so there is no place for {folder}: choose another --workdir")


def _faults(checks: Iterable[tuple[str, Callable[[], object]]]) -> list[str]:
    faults = []
    for about, check in checks:
        try:
            check()
        except UserError as error:
            faults.append(f"{about}{error}")
    return faults
