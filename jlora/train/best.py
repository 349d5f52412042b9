"""The best evaluation of a run: which step it was, and when to stop waiting for a better one."""

import math
from typing import Any

from jlora.errors import UserError
from jlora.train.algorithms.algorithm import Numbers
from jlora.train.settings import TrainConfig

FILE = "best.json"
# A number whose name ends like this is better when it is smaller, unless train.greater_is_better says otherwise.
SMALLER = ("loss", "perplexity", "error", "errors")


class Best:
    """Watches one number of the evaluation; does nothing without `train.best_metric`.

    Attributes:
        step, value: of the best evaluation so far; None before the first.
        waited: evaluations since then.
    """

    def __init__(self, train: TrainConfig) -> None:
        name, greater = train.best_metric, train.greater_is_better
        self._patience = train.patience
        self.metric = f"eval_{name.removeprefix('eval_')}" if name else None
        if greater is None and self.metric:
            # Of several adapters, the number of one is NAME/ADAPTER.
            greater = not any(part.endswith(SMALLER) for part in self.metric.split("/"))
        self.sign = 1 if greater else -1
        self.step: int | None = None
        self.value: float | None = None
        self.waited = 0

    @property
    def ended(self) -> bool:
        """Whether there were `train.patience` evaluations without a better one."""
        return bool(self._patience) and self.waited >= self._patience

    def see(self, step: int, numbers: Numbers) -> bool:
        """Whether the evaluation after `step` is the best so far. A value that is not finite never is.

        Raises:
            UserError: there is no such number.
        """
        if self.metric is None:
            return False
        if self.metric not in numbers:
            names = ", ".join(sorted(name for name in numbers if name.startswith("eval_")))
            raise UserError(f"train.best_metric is {self.metric}, which the evaluation does not give: it gives {names}")
        value = float(numbers[self.metric])
        if math.isfinite(value) and (self.value is None or self.sign * value > self.sign * self.value):
            self.step, self.value, self.waited = step, value, 0
            return True
        self.waited += 1
        return False

    def record(self) -> dict[str, Any]:
        """What best.json says."""
        return {"metric": self.metric, "step": self.step, "value": self.value}

    def get_state(self) -> dict[str, Any]:
        """What a resumed run has to know, as plain values."""
        return self.record() | {"sign": self.sign, "waited": self.waited}

    def set_state(self, position: dict[str, Any]) -> None:
        """Restores what a checkpoint knows, unless it is about another number."""
        if position.get("metric") == self.metric and position.get("sign") == self.sign:
            self.step, self.value, self.waited = position["step"], position["value"], position["waited"]

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.6g} at step {self.step}" if self.step else f"no finite {self.metric} yet"
