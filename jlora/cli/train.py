"""`jlora train`: runs a recipe with overrides in a workdir."""

import argparse
import dataclasses
import logging
import pathlib
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from jlora import allocator
from jlora.cli.overrides import add_sweep, read_run
from jlora.train import Interrupted, loop, many
from jlora.train.config import RunConfig
from jlora.train.config.typed import describe, group_of, is_required
from jlora.train.reporting.progress import Progress
from jlora.train.reporting.standings import show
from jlora.train.results import MODEL

INTERRUPTED = 75


def run(arguments: list[str]) -> int:
    """Runs the command and returns 0, or 75 if stopped early with everything saved."""
    options, overrides = _parser().parse_known_args(arguments)
    if options.profile is not None:
        overrides = [*overrides, f"--config.train.profile={options.profile}"]
    config = read_run(options.config, overrides, options.sweep)
    allocator.keep_freed_pages()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a traceback for each error before raising it
    workdir = options.workdir or str(pathlib.Path("runs") / pathlib.Path(options.config.partition(":")[0]).stem)
    if options.distributed:
        jax.distributed.initialize()
    with _stop_on_signal() as stop, Progress(sys.stderr) as progress:
        try:
            loop.run(config, workdir, progress=progress if jax.process_index() == 0 else None, stop=stop)
        except Interrupted as stopped:
            print(f"stopped early: {stopped}; the same command resumes from there", file=sys.stderr)
            return INTERRUPTED
    if jax.process_index() == 0:
        folder = many.FOLDER if config.adapters else "adapter"
        results = f"{folder} (PEFT)" if config.lora else f"{MODEL} (a whole model)"
        if config.adapters:
            show(config, workdir)
        print(f"done: {workdir}/{results}, {workdir}/metrics.jsonl")
    return 0


class _Stop:
    """Returns true once the process has been asked to end; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        print(f"{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr)


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Handles SIGTERM (preemption) and SIGINT (Ctrl-C) inside the context, and restores the previous handlers."""
    stop = _Stop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop.handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jlora train",
        usage="jlora train --config=FILE.py [--config.GROUP.KEY=VALUE ...] [--sweep=GROUP.KEY=VALUE,VALUE ...] "
        "[--workdir=DIR]",
        description="Fine-tune a model. Run the same command again to resume after an interruption.",
        epilog="settings and their defaults:\n\n" + "\n".join(_settings(RunConfig)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py", help="a file with get_config() (see configs/), or YAML or JSON"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="checkpoints, metrics and adapter (default: runs/<name of FILE>)"
    )
    add_sweep(parser)
    parser.add_argument(
        "--profile",
        metavar="N",
        help="trace N steps into the workdir's profile/ (train.profile), for xprof, TensorBoard",
    )
    parser.add_argument("--distributed", action="store_true", help="several hosts: call jax.distributed.initialize()")
    return parser


def _settings(cls: type, path: str = "") -> Iterator[str]:
    """One entry for every setting: its path, type and default."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if group := group_of(field, hint):
            yield from _settings(group, f"{path}{field.name}.")
            if group is not hint:
                yield f"  --config.{path + field.name:<26} None: without"
            continue
        made = field.default_factory is not dataclasses.MISSING
        default = (
            "required" if is_required(field) else f"default {field.default_factory() if made else field.default!r}"
        )
        line = f"  --config.{path + field.name:<26} {describe(hint)}; {default}"
        yield textwrap.fill(line, width=120, subsequent_indent=" " * 38, break_on_hyphens=False)
