"""A loss that is finite but explodes: how far it may rise above its lowest level, and since when it has."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Steps whose mean is a level of the loss, and how many in a row must lie above the limit.
WINDOW = 10


class Rise:
    """Watches the loss of one adapter, step by step.

    The limit is the lowest mean of `WINDOW` steps in a row so far, plus `times` the loss that the run began with (the
    mean of its first `WINDOW` steps, at least 1). Half of that marks where a rise begins.

    Attributes:
        since: the first step of the present rise; None if there is none.
        above: steps in a row whose loss was above the limit.
    """

    def __init__(self, times: float | None) -> None:
        self._times = times
        self._recent: list[float] = []
        self._began: float | None = None
        self._lowest = math.inf
        self.since: int | None = None
        self.above = 0

    @property
    def limit(self) -> float:
        """The loss above which a step counts; infinite while too little is known, or if nothing is watched."""
        return self._level(1.0)

    @property
    def diverged(self) -> bool:
        """Whether the last `WINDOW` losses all lay above the limit."""
        return self.above >= WINDOW

    def see(self, loss: float, step: int) -> None:
        """Adds a step's loss; one that is not finite tells nothing about levels."""
        if not math.isfinite(loss):
            return
        self.above = self.above + 1 if loss > self.limit else 0
        self.since = (self.since or step) if loss > self._level(0.5) else None
        self._recent = [*self._recent, loss][-WINDOW:]
        if len(self._recent) == WINDOW:
            mean = math.fsum(self._recent) / WINDOW
            self._began = mean if self._began is None else self._began
            self._lowest = min(self._lowest, mean)

    def get_state(self) -> dict[str, Any]:
        """What a resumed run has to know, as plain values."""
        lowest = self._lowest if math.isfinite(self._lowest) else None
        counts = {"since": self.since, "above": self.above}
        return {"recent": self._recent, "began": self._began, "lowest": lowest} | counts

    def set_state(self, position: dict[str, Any]) -> None:
        """Restores it."""
        self._recent, self._began = list(position["recent"]), position["began"]
        self._lowest = math.inf if position["lowest"] is None else position["lowest"]
        self.since, self.above = position["since"], position["above"]

    def __str__(self) -> str:
        margin = self.limit - self._lowest
        return (
            f"the losses of the last {WINDOW} steps all lie above {self.limit:.4g}: the lowest mean of {WINDOW} steps, "
            f"{self._lowest:.4g}, and {margin:.4g} more (train.max_rise={self._times:g} times what it began with)"
        )

    def _level(self, share: float) -> float:
        if self._times is None or self._began is None:
            return math.inf
        return self._lowest + share * self._times * max(1.0, abs(self._began))


def sound(rises: Sequence[Rise], steps: Sequence[int]) -> list[int]:
    """Of the checkpoints of these steps, the newest from before the loss rose; none if it has not.

    The loss of the first high step was computed at the weights after the step before, whose checkpoint is taken only if
    there is no older one.
    """
    since = [rise.since for rise in rises if rise.since is not None]
    if not since:
        return []
    before = [step for step in steps if step < min(since) - 1] or [step for step in steps if step < min(since)]
    return before[-1:]


def losses_of(metrics: Any, count: int) -> list[float]:
    """The loss of each of `count` adapters."""
    return np.broadcast_to(np.asarray(metrics["loss"], np.float64).ravel(), count).tolist()
