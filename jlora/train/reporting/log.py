"""Finished steps, told to metrics.jsonl and to whoever watches the run."""

import dataclasses

from jlora.train.algorithms.algorithm import Numbers
from jlora.train.reporting.metrics import MetricsWriter
from jlora.train.reporting.progress import Progress


@dataclasses.dataclass
class Log:
    """Reports finished steps to metrics.jsonl and the progress display.

    Attributes:
        last: the newest step's metrics.
    """

    writer: MetricsWriter | None
    progress: Progress | None
    every: int
    last: Numbers = dataclasses.field(default_factory=dict)
    # Some numbers come with a rollout rather than with every step: keep them for the next line written.
    _unlogged: Numbers = dataclasses.field(default_factory=dict)

    def tell(self, number: int, metrics: Numbers, *, at_once: bool = False) -> None:
        """Adds a step; `at_once` writes it to metrics.jsonl whatever `train.log_every` says."""
        if at_once or number % self.every == 0:
            self.write(number, metrics)
        else:
            self._unlogged |= metrics
        if self.progress:
            self.progress.update(number, metrics)
        self.last = metrics

    def write(self, number: int, metrics: Numbers) -> None:
        """Adds an object to metrics.jsonl."""
        if self.writer:
            self.writer.write(number, self._unlogged | metrics)
        self._unlogged = {}
