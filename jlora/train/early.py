"""Checks of a run's surroundings before its model is loaded: devices, folders, packages."""

import os
import pathlib
from collections.abc import Callable, Iterable

import jax

from jlora.errors import ExistingFileError, UserError, raise_all
from jlora.hub.adapters import check_adapter
from jlora.train.config import RunConfig
from jlora.train.planning.placement import Placement, place
from jlora.train.reporting.trackers import TRACKERS
from jlora.types import require


def check_surroundings(config: RunConfig, workdir: pathlib.Path) -> Placement:
    """Checks the run's surroundings and returns where it computes. Nothing is loaded or written.

    Raises:
        UserError: the settings or the model do not fit the devices (`placement.place`), adapters cannot be opened,
            packages are missing, or the workdir cannot be written; all in one message.
    """
    placed: list[Placement] = []
    runs = config.members().values() if config.adapters else [config]
    adapters = {one.model.adapter: "model.adapter" for one in runs if one.model.adapter}
    if config.rollout.reward_model:
        adapters[config.rollout.reward_model] = "rollout.reward_model"
    checks: list[tuple[str, Callable[[], object]]] = [
        (f"{setting}: ", lambda path=path: check_adapter(path)) for path, setting in adapters.items()
    ]
    checks.append(("", lambda: check_writable(workdir)))
    checks.append(("", lambda: placed.append(place(config, jax.devices()))))
    for name in config.train.tracked:
        checks.append((f"train.trackers: {name}: ", lambda name=name: require(TRACKERS[name].package, name)))
    raise_all(_faults(checks))
    return placed[0]


def check_writable(folder: pathlib.Path) -> None:
    """Raises UserError if a folder cannot be created or written to."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise ExistingFileError(f"{there} is a file; expected a folder to work in, or a place to make {folder}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} is not writable, so {folder} cannot be made: choose another --workdir")


def _faults(checks: Iterable[tuple[str, Callable[[], object]]]) -> list[str]:
    faults = []
    for about, check in checks:
        try:
            check()
        except UserError as error:
            faults.append(f"{about}{error}")
    return faults
