"""What a run leaves in its workdir once its steps are done: adapters or a model, curves, and what it used."""

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jlora import data, hub, lora, sharding, tree
from jlora.errors import number_of
from jlora.train.algorithms.algorithm import Base, Job, Note
from jlora.train.config import RunConfig
from jlora.train.reporting import usage
from jlora.train.reporting.metrics import can_plot, plot_curves
from jlora.train.state import TrainState
from jlora.types import Params

MODEL = "model"  # the folder of a fully tuned model


def tell_usage(
    workdir: pathlib.Path,
    base: Base,
    job: Job,
    state: TrainState,
    timed: Sequence[tuple[int, float, int]],
    note: Note,
    *,
    before: int,
    trains: Callable[[str], bool],
    flops: bool,
) -> None:
    """Reports the usage of the steps since the start and writes it to usage.json.

    The first two steps compile, so they count only if there are no others.

    Args:
        timed: tokens, seconds and row length of each step.
        before: the process's peak memory before the run.
        trains: (path) → whether the run trains the leaf.
        flops: also report MFU, whose FLOPs are those of the trained weights reading each token once.
    """
    steps = sorted(timed[2:] or timed, key=lambda one: one[0] / one[1])
    if not steps:
        return
    tokens, seconds, length = steps[(len(steps) - 1) // 2]
    per_token = None
    if flops:
        params = next(iter(job.adapters(state.trainable).values()))
        per_token = usage.flops_per_token(base.model.config, *lora.split(params, trains), length)
    devices = base.mesh.devices.ravel().tolist()
    used = usage.summary(tokens, seconds, per_token, used=devices, grown_from=before)
    note(f"{used} (median of {number_of(len(steps), 'step')})")
    if jax.process_index() == 0:
        about = {"device": devices[0].device_kind, "devices": len(devices), "steps": len(steps)}
        about["trainable_parameters"] = tree.count(state.trainable)
        write_json(workdir / "usage.json", used.numbers() | about)


def require_room(workdir: pathlib.Path, config: RunConfig, job: Job, state: TrainState) -> None:
    """Checks, before anything is trained, that `save_results` replaces no result that jlora did not write.

    Raises:
        FileExistsError: there is one, and it is left alone.
    """
    for name in [MODEL] if config.lora is None else job.adapters(state.trainable):
        hub.require_own(workdir / name, "move it away, or choose another --workdir")


def save_results(workdir: pathlib.Path, config: RunConfig, base: Base, job: Job, state: TrainState, note: Note) -> None:
    """Writes the adapters as PEFT folders, or the fully tuned model as a Hugging Face folder, and draws the curves.

    Then the algorithm may finish.
    """
    whole = config.lora is None
    adapters = {name: _gathered(params, whole) for name, params in job.adapters(state.trainable).items()}
    if jax.process_index() == 0:
        for name, params in adapters.items():
            if whole:
                hub.save_model(workdir / MODEL, base.model, params, tokenizer=run_tokenizer(config))
            else:
                _save_adapter(workdir / name, config, params, note)
        if can_plot():
            plot_curves(workdir, job.panels)
        else:
            note("no plots: pip install 'jlora[plots]' draws them")
    job.finish(state)


def _save_adapter(folder: pathlib.Path, config: RunConfig, params: Params, note: Note) -> None:
    hub.save_adapter(
        folder,
        params,
        base=config.model.path,
        fold=config.train.fold,
        experts=config.train.experts,
        save_embedding_layers=config.model.resize_vocab is not None,
    )
    if remark := hub.scales_note(folder):
        note(f"{folder.name}: {remark}")


def run_tokenizer(config: RunConfig) -> Any:
    """The run's tokenizer for a whole model's folder, with the chat template that it trained with."""
    tokenizer = hub.load_tokenizer(config.model.path)
    if config.data.system == "fold":
        data.fold_system(tokenizer)
    return tokenizer


def _gathered(params: Params, whole: bool) -> Params:
    """The params with everything that is written on this host: all of a `whole` model, or what an adapter's file holds.

    That is the adapter's leaves, and the embedding and head if it adapts them.
    """
    if jax.process_count() == 1:
        return params
    adapted = {path.rpartition("/")[0] for path in tree.flatten(params) if lora.is_adapter(path)}

    def gather(path: str, leaf: Any) -> Any:
        alone = path.rpartition("/")[0] in adapted and tree.stack_of(path) is None
        return sharding.on_host(leaf) if whole or alone or lora.is_adapter(path) else leaf

    return tree.map_with_path(gather, params)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the value to the file at once: a process that ends meanwhile leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(part, path)
