"""Numbers that are not finite: how such steps are counted, and when a run ends because of them."""

import pathlib
from collections.abc import Sequence

import numpy as np

from jlora.errors import Failed
from jlora.train.algorithms.algorithm import Note, Numbers
from jlora.train.step import FINITE, Metrics

# A run ends once this many steps in a row were skipped: by then it is not a spike.
MOST_SKIPPED = 10


class Diverged(Failed):
    """The loss, the gradient or the adapter is no longer finite; the message says where, and what is left."""


class Guard:
    """Counts the steps whose numbers are not finite, and decides when a run with nothing left to train ends.

    Args:
        policy: `train.on_nonfinite`.
        names: the adapters that are trained side by side; () for a single one.
        workdir: named in messages.
        note: is told about every adapter that the others continue without.
    """

    def __init__(self, policy: str, names: Sequence[str], workdir: pathlib.Path, note: Note) -> None:
        self._policy, self._names, self._workdir, self._note = policy, names, workdir, note
        self._limit = MOST_SKIPPED if policy == "skip" else 1
        # What stopped the run, and the step.
        self.ended: tuple[str, int] | None = None
        count = max(1, len(names))
        self._skipped, self._in_a_row = np.zeros(count, int), np.zeros(count, int)

    def see(self, metrics: Metrics, step: int) -> Numbers:
        """Looks at a step's metrics and returns the numbers to log."""
        finite = np.atleast_1d(np.asarray(metrics[FINITE], bool))
        self._skipped += ~finite
        self._in_a_row = np.where(finite, 0, self._in_a_row + 1)
        for place in np.flatnonzero(self._in_a_row == self._limit) if self._names else ():
            before = f"its adapter stays as it was after step {step - self._limit}"
            if self._policy == "skip":
                before = f"its last {self._limit} steps were skipped: {before} until a step of its own is finite again"
            self._note(
                f"{self._names[place]}: {_what(metrics, int(place))} at step {step}; the others continue, and {before}"
            )
        if (self._in_a_row >= self._limit).all():
            self.ended = _what(metrics, int(np.argmin(self._in_a_row))), step
        return {"skipped_steps": float(self._skipped.sum())} if self._policy == "skip" else {}

    def error(self, kept: Sequence[int]) -> Diverged:
        """The exception that ends a run once `ended` is set.

        Args:
            kept: the steps of the checkpoints, the newest last.
        """
        what, step = self.ended
        rows = f", the last of {self._limit} steps in a row that were skipped" if self._limit > 1 else ""
        each = f", for each of {len(self._names)} adapters" if self._names else ""
        lines = [f"stopped: {what} at step {step}{rows}{each}"]
        lines += _left(what, step - self._limit, bool(self._names), self._workdir, kept)
        single = "; for single bad batches, train.on_nonfinite=skip continues without them, in this workdir too"
        # Several adapters that were frozen when they stopped stay frozen, so skipping would not help them.
        return Diverged("\n  ".join([*lines, HELP + ("" if self._names or self._policy == "skip" else single)]))

    def get_state(self) -> dict[str, list[int]]:
        """The counts, as plain values."""
        return {"skipped": self._skipped.tolist(), "in_a_row": self._in_a_row.tolist()}

    def set_state(self, position: dict[str, list[int]]) -> None:
        """Restores the counts of a checkpoint; {} if it has none."""
        if position:
            self._skipped, self._in_a_row = np.array(position["skipped"]), np.array(position["in_a_row"])


ADAPTER = "the adapter or its moments are not finite"
LOSS = "the loss"
HELP = (
    "what usually helps, in a new workdir: a lower optim.learning_rate, optim.warmup_steps, "
    "model.dtype=bfloat16 instead of float16, or a smaller optim.max_grad_norm"
)


def _what(metrics: Metrics, place: int) -> str:
    """Says which of the step's numbers is not finite: the first of loss, gradient norm and adapter."""
    for name, words in (("loss", LOSS), ("grad_norm", "the gradient's norm")):
        value = float(np.atleast_1d(np.asarray(metrics[name]))[place])
        if not np.isfinite(value):
            return f"{words} is {value}"
    return ADAPTER


def _left(what: str, before: int, several: bool, workdir: pathlib.Path, kept: Sequence[int]) -> list[str]:
    """Says what is left of the run, as lines of a message.

    Args:
        before: the last step that changed the weights. If the loss is not finite, it is not finite at these weights,
            and a checkpoint of them may be spoiled.
    """
    if not kept:
        return [f"nothing was saved before it; {workdir} can be used for another run"]
    doubted = what.startswith(LOSS) and not several and kept[-1] >= before
    good = max([step for step in kept if step < before] if doubted else kept, default=kept[-1])
    export = f"jlora export --workdir={workdir} --step={good} --out=DIR"
    where = f"{workdir}/checkpoints/{good}" if several else f"`{export}` writes its adapter"
    words = "gave a finite loss" if good < kept[-1] else "holds finite numbers"
    lines = [f"the last checkpoint that {words} is that of step {good}{': ' if several else '; '}{where}"]
    if doubted:
        older = "" if good < kept[-1] else "; train.keep_checkpoints of 2 or more keeps an older one"
        lines.append(
            f"the checkpoint of step {kept[-1]} holds the weights that give the loss above: they are spoiled, unless "
            f"it is due to the batch{older}"
        )
    return lines
