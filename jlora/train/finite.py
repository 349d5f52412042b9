"""Numbers that are not finite or explode: how such steps are counted, and when a run ends because of them."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.errors import Failed, number_of
from jlora.train.algorithms.algorithm import Note, Numbers
from jlora.train.diverging import Rise, losses_of, sound
from jlora.train.step import FINITE, Metrics

# A run ends once this many steps in a row were skipped: by then it is not a spike.
MOST_SKIPPED = 10


class Diverged(Failed):
    """A number is no longer finite, or the loss has exploded; the message says where, and what is left."""


class Guard:
    """Counts steps whose numbers are not finite or too high, and decides when a run with nothing left to train ends.

    Args:
        policy: `train.on_nonfinite`.
        names: the adapters that are trained side by side; () for a single one.
        workdir: named in messages.
        note: is told about every adapter that the others continue without.
        max_rise: see `Rise`; None: the loss may rise as it likes.
    """

    def __init__(
        self,
        policy: str,
        names: Sequence[str],
        workdir: pathlib.Path,
        note: Note,
        max_rise: int | float | None = None,
    ) -> None:
        self._policy, self._names, self._workdir, self._note = policy, names, workdir, note
        self._limit = MOST_SKIPPED if policy == "skip" else 1
        # What stopped the run, and the step.
        self.ended: tuple[str, int] | None = None
        count = max(1, len(names))
        self._skipped, self._in_a_row = np.zeros(count, int), np.zeros(count, int)
        self._rises = [Rise(max_rise) for _ in range(count)]

    def see(self, metrics: Metrics, step: int) -> Numbers:
        """Looks at a step's metrics and returns the numbers to log."""
        finite = np.atleast_1d(np.asarray(metrics[FINITE], bool))
        self._skipped += ~finite
        self._in_a_row = np.where(finite, 0, self._in_a_row + 1)
        for place in np.flatnonzero(self._in_a_row == self._limit) if self._names else ():
            before = f"its adapter stays as it was after step {step - self._limit}"
            if self._policy == "skip":
                skipped = number_of(self._limit, "step")
                before = f"it skipped its last {skipped}: {before} until a step of its own is finite again"
            self._note(
                f"{self._names[place]}: {_what(metrics, int(place))} at step {step}; the others continue, and {before}"
            )
        self._see_rises(losses_of(metrics, len(self._rises)), step)
        lost = self._in_a_row >= self._limit
        if lost.all():
            self.ended = _what(metrics, int(np.argmin(self._in_a_row))), step
        elif all(one or rise.diverged for one, rise in zip(lost, self._rises, strict=True)):
            self.ended = RISEN, step
        return {"skipped_steps": float(self._skipped.sum())} if self._policy == "skip" else {}

    def _see_rises(self, losses: Sequence[float], step: int) -> None:
        for place, (rise, loss) in enumerate(zip(self._rises, losses, strict=True)):
            before = rise.diverged
            rise.see(loss, step)
            if self._names and rise.diverged and not before:
                self._note(f"{self._names[place]}: its loss has exploded at step {step}: {rise}")

    def sound(self, steps: Sequence[int]) -> list[int]:
        """Of the checkpoints of these steps, one from before the loss rose, while it is high; see `diverging.sound`."""
        return sound(self._rises, steps)

    def error(self, kept: Sequence[int]) -> Diverged:
        """The exception that ends a run once `ended` is set.

        Args:
            kept: the steps of the checkpoints, the newest last.
        """
        what, step = self.ended
        if what == RISEN:
            return self._risen(step, kept)
        rows = f", the last of {self._limit} steps in a row that were skipped" if self._limit > 1 else ""
        each = f", for each of {number_of(len(self._names), 'adapter')}" if self._names else ""
        lines = [f"stopped: {what} at step {step}{rows}{each}"]
        lines += _left(what, step - self._limit, bool(self._names), self._workdir, kept)
        single = "; for single bad batches, train.on_nonfinite=skip continues without them, in this workdir too"
        # Several adapters that were frozen when they stopped stay frozen, so skipping would not help them.
        return Diverged("\n  ".join([*lines, HELP + ("" if self._names or self._policy == "skip" else single)]))

    def _risen(self, step: int, kept: Sequence[int]) -> Diverged:
        rise = next(rise for rise in self._rises if rise.diverged)
        each = f", like those of each of {number_of(len(self._names), 'adapter')} or not finite" if self._names else ""
        lines = [f"stopped: the loss has exploded at step {step}: {rise}{each}"]
        if good := self.sound(kept):
            where = _export(self._workdir, good[-1], bool(self._names))
            lines.append(f"the last checkpoint from before it rose is that of step {good[-1]}{where}")
        else:
            lines.append(f"no checkpoint is from before it rose, at step {rise.since}")
        return Diverged("\n  ".join([*lines, f"{HELP}; train.max_rise=None lets the loss rise"]))

    def get_state(self) -> dict[str, list[Any]]:
        """The counts, as plain values."""
        rises = [rise.get_state() for rise in self._rises]
        return {"skipped": self._skipped.tolist(), "in_a_row": self._in_a_row.tolist(), "rises": rises}

    def set_state(self, position: dict[str, list[Any]]) -> None:
        """Restores the counts of a checkpoint; {} if it has none."""
        if position:
            self._skipped, self._in_a_row = np.array(position["skipped"]), np.array(position["in_a_row"])
            # Older versions did not watch the loss.
            for rise, state in zip(self._rises, position.get("rises", ()), strict=False):
                rise.set_state(state)


ADAPTER = "the adapter or its moments are not finite"
LOSS = "the loss"
RISEN = "the loss has exploded"
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
    words = "gave a finite loss" if good < kept[-1] else "holds finite numbers"
    lines = [f"the last checkpoint that {words} is that of step {good}{_export(workdir, good, several)}"]
    if doubted:
        older = "" if good < kept[-1] else "; train.keep_checkpoints of 2 or more keeps an older one"
        lines.append(
            f"the checkpoint of step {kept[-1]} holds the weights that give the loss above: they are spoiled, unless "
            f"it is due to the batch{older}"
        )
    return lines


def _export(workdir: pathlib.Path, step: int, several: bool) -> str:
    """Says where the weights of a step are, as the end of a sentence."""
    if several:
        return f": {workdir}/checkpoints/{step}"
    return f"; `jlora export --workdir={workdir} --step={step} --out=DIR` writes its adapter"
