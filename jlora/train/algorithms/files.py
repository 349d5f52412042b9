"""Runs on files: their examples are items, planned into the batches of a run before it begins."""

import functools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jlora import data, sharding
from jlora.train.algorithms.algorithm import Base, Job, Note, Numbers, Plan
from jlora.train.reporting.progress import LINE_EVERY_SECONDS
from jlora.train.settings import SharedConfig
from jlora.train.state import TrainState
from jlora.train.step import Batch, Metrics

# (the steps of a run, base) → its job
Start = Callable[[Sequence[data.Step], Base], Job]


def plan(
    config: SharedConfig,
    items: Sequence[data.Item],
    encoded: data.EncodeReport,
    start: Start,
    note: Note,
    *,
    noun: str,
    share: bool = False,
    held_out: Sequence[data.Item] = (),
) -> Plan:
    """The run on these items, which `noun` calls by name.

    Args:
        share: see `data.plan_items`.
        held_out: the items of the evaluation, if it reads items.
    """
    train = config.train
    steps = _steps(config, items, share, train.epochs, train.steps)
    note(f"{len(items)} {noun}, {data.describe(encoded, steps)}")
    documents = data.documents_of(items)
    longest = max(int(data.lengths_of(some).max(initial=0)) for some in (documents, data.documents_of(held_out)))
    return Plan(len(steps), functools.partial(start, steps), longest, checksum(documents))


def fullest(config: SharedConfig, items: Sequence[data.Item], start: Start, *, share: bool = False) -> Plan:
    """A plan of one step on these items, which have documents of the maximum length."""
    steps = _steps(config, items, share, None, 1)
    return Plan(1, functools.partial(start, steps), config.train.seq_len)


def in_order(config: SharedConfig, items: Sequence[data.Item], share: bool) -> Iterator[data.Batch]:
    """Every item once, in order, in batches of one micro-batch."""
    train = config.train
    settings = dict(seq_len=train.seq_len, batch_size=train.batch_size, bucket=config.data.bucket)
    return data.in_order(items, share=share, **settings)


def _steps(
    config: SharedConfig, items: Sequence[data.Item], share: bool, epochs: int | float | None, steps: int | None
) -> list[data.Step]:
    train = config.train
    return data.plan_items(
        items,
        seq_len=train.seq_len,
        batch_size=train.batch_size,
        grad_accum=train.grad_accum,
        packing=config.data.packing,
        bucket=config.data.bucket,
        seed=train.seed,
        epochs=epochs,
        steps=steps,
        share=share,
    )


def checksum(examples: Iterable[data.Example]) -> str:
    """A checksum of the examples' tokens, which of them are trained, and their order, as eight hex digits."""
    if isinstance(examples, data.Examples):
        return examples.checksum
    found = 0
    for example in examples:
        found = zlib.crc32(np.asarray(example.tokens, np.int32).tobytes(), found)
        found = zlib.crc32(np.asarray(example.trained, np.bool_).tobytes(), found)
    return f"{found:08x}"


class Told:
    """Notes every few seconds how much of something is done.

    Args:
        what: what is counted and what happens to it: "records encoded".
        clock: returns seconds; for tests.
    """

    def __init__(self, note: Note, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._note, self._what, self._clock = note, what, clock
        self._began = self._last = clock()

    def __call__(self, done: int) -> None:
        """Notes that so many are done, if it is time to."""
        now = self._clock()
        if now - self._last >= LINE_EVERY_SECONDS:
            self._last = now
            self._note(f"{done:,} {self._what}, {done / (now - self._began):,.0f} a second")


class FileSource:
    """Batches of a fixed data set, from a grain iterator that can be resumed."""

    boundary = ahead = True

    def __init__(self, batches: Iterator[data.Batch], mesh: jax.sharding.Mesh, *, sides: int = 1) -> None:
        """`sides` says how many documents of each item count as tokens of the data."""
        self._batches, self._mesh, self._sides = batches, mesh, sides

    def next(self, state: TrainState) -> tuple[Batch, int, Numbers]:
        """The next batch; the policy plays no part."""
        batch, count = self.read()
        return sharding.put_batch(batch, self._mesh), count, {}

    def read(self) -> tuple[data.Batch, int]:
        """The next batch on the host, and how many tokens it holds."""
        batch = next(self._batches)
        return batch, data.count_tokens(batch, self._sides)

    def observe(self, metrics: Metrics) -> None:
        """Does nothing: there is nothing to check."""

    def get_state(self) -> dict[str, Any]:
        """The grain iterator's position."""
        return self._batches.get_state()

    def set_state(self, position: dict[str, Any]) -> None:
        """Goes to a position of the grain iterator."""
        self._batches.set_state(position)
