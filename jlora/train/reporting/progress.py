"""What a person watching a run sees: a live bar on a terminal, an occasional line anywhere else."""

import io
import math
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

from jlora.errors import number_of

LINE_EVERY_SECONDS = 15.0
BAR_EVERY_SECONDS = 0.2


class Progress:
    """Shows the step, the loss, tokens per second and the time left.

    The bar appears with `start`: the number of steps is known only once the data has been read.

    Args:
        stream: where to write.
        clock: returns seconds; for tests.
    """

    def __init__(self, stream: io.TextIOBase | TextIO, *, clock: Callable[[], int | float] = time.monotonic) -> None:
        self._console = Console(file=stream, highlight=False)
        self._clock = clock
        self._bar: Bar | None = None
        self._task: Any = None
        self._total = 0
        # Step and time that speed is measured from: the first update, since the first step includes compilation.
        self._first: tuple[int, float] | None = None
        self._shown = -math.inf

    def start(self, total_steps: int, start_step: int = 0) -> None:
        """Begins a run of `total_steps` steps, `start_step` of which are already done."""
        self._total, self._first = total_steps, None
        if start_step >= total_steps:
            self.note(f"finished already, after {number_of(total_steps, 'step')}: nothing is trained")
        elif start_step:
            self.note(f"resuming after step {start_step} of {total_steps}")
        if self._console.is_terminal and start_step < total_steps:
            columns = (SpinnerColumn(), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, text="compiling")
            self._bar.start()

    @property
    def begun(self) -> bool:
        """Whether a step is done since `start`."""
        return self._first is not None

    def counting(self, what: str) -> "Counting":
        """Shows how much of something is done before the run begins: "encoding records of train.jsonl"."""
        return Counting(what, self.note, self._console if self._console.is_terminal else None, self._clock)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows that `step` is done.

        Without a terminal: a line for the first and the last step, and one every few seconds.
        """
        now = self._clock()
        self._first = self._first or (step, now)
        text = "  ".join(part for part in (*_numbers(metrics), self._left(step, now)) if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step >= self._total or now - self._shown >= LINE_EVERY_SECONDS:
            self._shown = now
            self.note(f"step {step}/{self._total}  {text}")

    def note(self, message: str) -> None:
        """Shows one line, above the bar on a terminal."""
        self._console.print(message, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the display; closing twice is fine."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, step: int, now: int | float) -> str:
        first, began = self._first or (step, now)
        if not first < step < self._total:
            return ""
        return f"{duration((now - began) / (step - first) * (self._total - step))} left"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        self.close()


class Counting:
    """How many records are done, how many that is a second, and the time left: on a console a bar, or else lines.

    Args:
        what: what is done, and to what.
        note: takes a line, every few seconds, if there is no console.
        clock: returns seconds; for tests.
    """

    def __init__(
        self,
        what: str,
        note: Callable[[str], None],
        console: Console | None = None,
        clock: Callable[[], int | float] = time.monotonic,
    ) -> None:
        self._what, self._note, self._clock = what, note, clock
        self._began = self._last = clock()
        self._bar = self._task = None
        if console is not None:
            fields = "{task.description}", "{task.fields[text]}"
            first, last = (TextColumn(field, markup=False) for field in fields)
            self._bar = Bar(SpinnerColumn(), first, BarColumn(), last, console=console, transient=True)
            self._task = self._bar.add_task(what, total=None, text="")

    def __call__(self, records: int, share: float | None = None) -> None:
        """So many records are done, which is this share of all, if that is known."""
        now = self._clock()
        if now - self._last < (LINE_EVERY_SECONDS if self._bar is None else BAR_EVERY_SECONDS):
            return
        self._last, seconds = now, now - self._began
        text = f"{number_of(records, 'record')}, {records / seconds:,.0f} a second"
        if share:
            text += f", {duration(seconds / share - seconds)} left"
        if self._bar is None:
            self._note(f"{self._what}: {text}" if share is None else f"{self._what} ({share:.0%}): {text}")
        else:
            self._bar.start()  # what is done at once is not shown
            self._bar.update(self._task, total=None if share is None else 1.0, completed=share or 0.0, text=text)

    def __enter__(self) -> "Counting":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: int | float) -> str:
    """'45s', '3m20s', '2h05m'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    formats = {"loss": "loss {:.4f}", "eval_loss": "eval loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}
    return [text.format(float(metrics[name])) for name, text in formats.items() if metrics.get(name) is not None]
