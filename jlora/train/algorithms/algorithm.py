"""The interface between the loop and an algorithm, whatever it learns from."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jlora import data, lora, sharding
from jlora.models import Model
from jlora.train.state import TrainState
from jlora.train.step import Batch, Metrics, Objective, Step
from jlora.types import Params

Numbers = dict[str, float]
Note = Callable[[str], None]


@runtime_checkable
class Source(Protocol):
    """Where batches come from: files or the policy itself."""

    @property
    def boundary(self) -> bool:
        """Whether a run may be saved and stopped here, with all that it needs to resume in `get_state`."""

    @property
    def ahead(self) -> bool:
        """Whether the next batch may be requested while the last step is still being computed, because it depends on
        neither that step's state nor its metrics.
        """

    def next(self, state: TrainState) -> tuple[Batch, int, Numbers]:
        """The next step's batch on the mesh, how many tokens it holds, and what to report about how it was made."""

    def observe(self, metrics: Metrics) -> None:
        """Called with a step's metrics: those of the last batch or, if the source is `ahead`, of the one before it.

        Raises:
            RuntimeError: the step does not fit the batch.
        """

    def get_state(self) -> dict[str, Any]:
        """The position, as plain values."""

    def set_state(self, position: dict[str, Any]) -> None:
        """Goes to a position."""


class FileSource:
    """Batches of a fixed data set, from a grain iterator that can be resumed."""

    boundary = ahead = True

    def __init__(self, batches: Iterator[data.Batch], mesh: jax.sharding.Mesh, *, sides: int | None = None) -> None:
        """For batches of items, `sides` says how many documents of each item count as tokens of the data; None if the
        batches hold no items.
        """
        self._batches, self._mesh, self._sides = batches, mesh, sides

    def next(self, state: TrainState) -> tuple[Batch, int, Numbers]:
        """The next batch; the policy plays no part."""
        batch, count = self.read()
        return sharding.put_batch(batch, self._mesh), count, {}

    def read(self) -> tuple[data.Batch, int]:
        """The next batch on the host, and how many tokens it holds."""
        batch = next(self._batches)
        count = int(np.sum(batch["segment_ids"] > 0)) if self._sides is None else data.count_tokens(batch, self._sides)
        return batch, count

    def observe(self, metrics: Metrics) -> None:
        """Does nothing: there is nothing to check."""

    def get_state(self) -> dict[str, Any]:
        """The grain iterator's position."""
        return self._batches.get_state()

    def set_state(self, position: dict[str, Any]) -> None:
        """Goes to a position of the grain iterator."""
        self._batches.set_state(position)


@dataclasses.dataclass(frozen=True)
class Base:
    """A model with its starting adapter, ready for an algorithm.

    Attributes:
        frozen, trainable: the two halves of its params; `frozen` is on the mesh.
        reference: the starting adapter if the run continues from one, {} if it starts from the base.
        workdir: where an algorithm may write files of its own.
        place: puts a tree on the mesh; for a tree of shapes, gives them their shardings.
    """

    model: Model
    tokenizer: Any
    mesh: jax.sharding.Mesh
    frozen: Params
    trainable: Params
    reference: Params
    workdir: Any
    place: Callable[[Params, jax.sharding.Mesh], Params] = sharding.shard

    @property
    def constants(self) -> Params:
        """What a step does not change: the frozen half and the reference policy's adapter."""
        return {"policy": self.frozen, "reference": self.reference}


def reference_params(constants: Params) -> Params:
    """The reference policy's params: the same base with the starting adapter, or with none."""
    return lora.overlay(constants["policy"], constants["reference"])


@dataclasses.dataclass(frozen=True)
class Learning:
    """What the loop advances.

    Attributes:
        state: before the first step.
        step: (state, `Job.frozen`, batch) → (state, metrics).
        read: (a step's metrics on the host, the step's number) → numbers for the log.
    """

    state: TrainState
    step: Step
    read: Callable[[Metrics, int], Numbers]


def placement(state: TrainState) -> TrainState:
    """The state with each array replaced by its sharding."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


@dataclasses.dataclass(frozen=True)
class Job:
    """An algorithm at work on a base.

    Attributes:
        trainable: the weights that training starts from: `Base.trainable` alone, or several adapters by name.
        frozen: the second argument of the step.
        objective, source: what is minimised, and on which batches.
        report: (a step's metrics on the host) → numbers for the log besides loss, rate and gradient norm.
        adapters: (trained weights) → params to save in PEFT's format, by folder name.
        evaluate: (state) → numbers; None if the algorithm does not evaluate.
        panels: (title, names of the numbers) of each panel of curves.png besides loss, rate and gradient norm.
        fixed: the frozen half of each adapter by name, if not in `Base.frozen`.
        finish: (state) → None, called once at the end.
        learn: (settings, base, this job, total steps) → what the loop advances; None: `jlora.train.learning.learn`.
    """

    trainable: Params
    frozen: Params
    objective: Objective
    source: Source
    report: Callable[[Metrics], Numbers]
    adapters: Callable[[Params], dict[str, Params]]
    evaluate: Callable[[TrainState], Numbers] | None = None
    panels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    fixed: Params = dataclasses.field(default_factory=dict)
    finish: Callable[[TrainState], None] = lambda state: None
    learn: Callable[..., Learning] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known about a run before its model is loaded, so that user mistakes are found early.

    Attributes:
        total_steps: optimizer steps.
        start: (base) → the algorithm's job on it.
        longest: tokens of the longest text that the model reads or writes.
        tokens: checksum of everything that was encoded for training.
    """

    total_steps: int
    start: Callable[[Base], Job]
    longest: int = 0
    tokens: str = ""


def checksum(examples: Iterable[data.Example]) -> str:
    """A checksum of the examples' tokens, which of them are trained, and their order, as eight hex digits."""
    found = 0
    for example in examples:
        found = zlib.crc32(np.asarray(example.tokens, np.int32).tobytes(), found)
        found = zlib.crc32(np.asarray(example.trained, np.bool_).tobytes(), found)
    return f"{found:08x}"
