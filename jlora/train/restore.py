"""The model as a run left it, read from its workdir: for export, not for resuming, which the loop does."""

import json
import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora import checkpoint, hub, lora, tree
from jlora.errors import MissingFileError, UserError
from jlora.models import Model
from jlora.train.adapt import adapt
from jlora.train.algorithms import ALGORITHMS
from jlora.train.best import FILE as BEST
from jlora.train.config import RunConfig, resolve
from jlora.types import Params


def load_run(workdir: str | os.PathLike, step: int | None = None) -> tuple[RunConfig, Model, Params]:
    """The run's settings, its model, and the params with the adapter as it was after `step`.

    None stands for the step whose adapter the run leaves: the best one if it looks for it, or else the newest saved.

    The base is loaded as the run held it, quantised if the run quantised it.

    Raises:
        FileNotFoundError: this is not the workdir of a run, or nothing was saved at that step.
        ValueError: the base model is not the one that the run was trained on, the run trained several adapters, or
            another version of jlora saved it.
    """
    folder = pathlib.Path(workdir)
    config = read_config(folder)
    if config.adapters:
        raise UserError(
            f"{folder} is a run of several adapters: give the folder of one, {folder}/adapters/"
            f"{{{','.join(config.adapters)}}}, which is there once the run has ended"
        )
    with checkpoint.reader(_checkpoints(folder)) as saved:
        found = _choose(folder, sorted(saved.all_steps()), step, best_step(folder, config))
        manifest = checkpoint.read_manifest(saved, found)
        settings = dict(dtype=config.model.dtype, quant=config.model.quant, vocab=config.model.resize_vocab)
        model, params = hub.load(config.model.path, **settings)
        fixed = checkpoint.read_fixed(saved, found)
        frozen, trainable = lora.split(adapt(model, params, config, fixed), config.trains)
        # Of the frozen half, since an adapter may have brought its own embedding, and trained weights may be anything.
        if manifest["base"] != checkpoint.fingerprint(lora.strip(frozen)):
            raise UserError(f"{config.model.path} is not the model that {folder} was trained on: its weights differ")
        path = ALGORITHMS[config.algorithm].policy
        return config, model, lora.combine(frozen, _restore(saved, found, trainable, path))


def read_config(workdir: str | os.PathLike) -> RunConfig:
    """The settings of the run.

    Raises:
        FileNotFoundError: this is not the workdir of a run.
        ValueError: the settings are invalid.
    """
    folder = pathlib.Path(workdir)
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{folder} is not the workdir of a run: there is no config.json in it")
    return resolve(json.loads(path.read_text(encoding="utf-8")))


def best_step(workdir: pathlib.Path, config: RunConfig) -> int | None:
    """The best step of the run so far; None if it does not look for it or leaves the last step's adapter."""
    path = workdir / BEST
    if not (config.train.best_metric and config.train.load_best and path.is_file()):
        return None
    return json.loads(path.read_text(encoding="utf-8"))["step"]


def _checkpoints(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "checkpoints"
    if not path.is_dir():
        raise MissingFileError(f"{folder} has no checkpoints: the run ended before the first one was saved")
    return path


def _choose(folder: pathlib.Path, steps: list[int], wanted: int | None, best: int | None) -> int:
    if not steps:
        raise MissingFileError(f"{folder} has no checkpoints: the run ended before the first one was saved")
    if wanted is not None and wanted not in steps:
        raise MissingFileError(
            f"{folder} has no checkpoint of step {wanted}; there are those of {', '.join(map(str, steps))}"
        )
    return wanted if wanted is not None else best if best in steps else steps[-1]


def _restore(saved: ocp.CheckpointManager, step: int, trainable: Params, path: tuple[str, ...] = ()) -> Params:
    """The adapters alone, read as host arrays and put on the devices of `trainable`, whatever devices the run had.

    Args:
        path: where they are among the trained weights.
    """
    wanted = trainable
    for name in reversed(("trainable", *path)):
        wanted = {name: wanted}
    as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    found = saved.restore(step, args=ocp.args.Composite(state=args)).state
    for name in ("trainable", *path):
        found = found[name]
    flat = tree.flatten(found)
    return tree.map_with_path(lambda path, leaf: jax.device_put(flat[path], leaf.sharding), trainable)
