"""`jlora train`: runs a recipe with overrides in a workdir."""

import argparse
import pathlib
import signal
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from jlora import allocator
from jlora.cli.overrides import read_run
from jlora.train import Interrupted, loop, many
from jlora.train.reporting.progress import Progress
from jlora.train.reporting.standings import show
from jlora.train.results import MODEL

INTERRUPTED = 75


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0, or 75 if stopped early with everything saved."""
    overrides = options.overrides
    if options.profile is not None:
        overrides = [*overrides, f"--config.train.profile={options.profile}"]
    config = read_run(options.config, overrides, options.sweep)
    allocator.keep_freed_pages()
    workdir = options.workdir or str(pathlib.Path("runs") / pathlib.Path(options.config.partition(":")[0]).stem)
    if options.distributed:
        jax.distributed.initialize()
    with Progress(sys.stderr) as progress, _stop_on_signal(progress, alone=not options.distributed) as stop:
        try:
            loop.run(config, workdir, progress=progress if jax.process_index() == 0 else None, stop=stop)
        except Interrupted as stopped:
            print(f"stopped early: {stopped}; the same command resumes from there", file=sys.stderr)
            return INTERRUPTED
        except KeyboardInterrupt:
            if not stop.at_once:
                raise
            print(
                f"stopped early: {stop.at_once} before a step was done; the same command starts again", file=sys.stderr
            )
            return INTERRUPTED
    if jax.process_index() == 0:
        folder = many.FOLDER if config.adapters else "adapter"
        results = f"{folder} (PEFT)" if config.lora else f"{MODEL} (a whole model)"
        if config.adapters:
            show(config, workdir)
        print(f"done: {workdir}/{results}, {workdir}/metrics.jsonl")
    return 0


class _Stop:
    """Returns true once the process has been asked to end; a second Ctrl-C ends it at once.

    Before the first step there is nothing to save, so the first signal ends it at once too, unless other hosts would
    wait for this one.

    Attributes:
        at_once: the name of a signal that ended the process so.
    """

    def __init__(self, progress: Progress, *, alone: bool) -> None:
        self.asked, self.at_once = False, ""
        self._progress, self._alone = progress, alone

    def __call__(self) -> bool:
        return self.asked

    def handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        name = signal.Signals(number).name
        if self._alone and not self._progress.begun:
            self.at_once = name
            raise KeyboardInterrupt  # no `Exception`, which would be told as one of a reward's or a record's
        print(f"{name}: stopping once a step is done and saved; Ctrl-C again stops at once", file=sys.stderr)


@contextmanager
def _stop_on_signal(progress: Progress, *, alone: bool) -> Iterator[_Stop]:
    """Handles SIGTERM (preemption) and SIGINT (Ctrl-C) inside the context, and restores the previous handlers."""
    stop = _Stop(progress, alone=alone)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop.handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
