"""A trace of what the devices and the host do in a few steps of a run, for xprof and TensorBoard."""

import pathlib
import types

import jax

from jlora.train.algorithms.algorithm import Note

FOLDER = "profile"
# Steps at a run's start that a trace leaves out: they compile, and the first one after that finds cold caches.
WARM_UP = 2


class Trace:
    """Traces `count` steps of a run into `workdir`/profile: those after its first two, or its last if it has fewer.

    Args:
        count: 0 traces nothing.
        start, total_steps: the step that the run resumes after, and its last step.
        note: is told where the trace is.
    """

    def __init__(self, workdir: pathlib.Path, count: int, start: int, total_steps: int, note: Note) -> None:
        self._folder, self._note = workdir / FOLDER, note
        self._first = max(start + 1, min(start + 1 + WARM_UP, total_steps - count + 1))
        self._last = min(total_steps, self._first + count - 1)
        self._open = False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """A context that marks what the host does to dispatch a step."""
        if number == self._first <= self._last:
            jax.profiler.start_trace(self._folder)
            self._open = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int) -> None:
        """Called when a step is done; ends the trace after its last step."""
        if self._open and number >= self._last:
            self.close()
            steps = f"step {self._first}" if self._first == number else f"steps {self._first} to {number}"
            self._note(
                f"a trace of {steps} is in {self._folder}: `xprof {self._folder}` (pip install xprof) or "
                f"`tensorboard --logdir={self._folder}` shows it"
            )

    def close(self) -> None:
        """Writes what has been traced so far; closing twice is fine."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        self.close()
