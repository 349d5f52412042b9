"""The interface between an algorithm and the rest of jlora, whatever it learns from."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from jlora import data, lora, sharding
from jlora.models import Model
from jlora.train.settings import SharedConfig
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
        """Whether the next batch may be requested while the last step is still being computed.

        It may if it depends on neither that step's state nor its metrics.
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


@dataclasses.dataclass(frozen=True)
class Base:
    """A model with its starting adapter, ready for an algorithm.

    Attributes:
        frozen, trainable: the two halves of its params; `frozen` is on the mesh.
        reference: the starting adapter if the run continues from one, {} if it starts from the base; in full
            fine-tuning, the trained weights as they were, for algorithms that compare with them.
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


def reference_name(config: SharedConfig) -> str:
    """The reference policy in words."""
    return f"the adapter {config.model.adapter}" if config.model.adapter else "the base model"


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
        held_out: the evaluation's records, with an answer each, if texts can be generated for them.
        encoded: what is trained on, for `jlora data`; None where nothing is known before the model is.
        replanned: (settings that differ in seed and length alone) → their `total_steps` and `start` on what is encoded
            already; None if the algorithm trains no adapters side by side.
    """

    total_steps: int
    start: Callable[[Base], Job]
    longest: int = 0
    tokens: str = ""
    held_out: Sequence[dict[str, Any]] = ()
    encoded: "Encoded | None" = None
    replanned: Callable[[SharedConfig], tuple[int, Callable[[Base], Job]]] | None = None

    def again(self, config: SharedConfig) -> "Plan":
        """The plan of settings that differ in seed and length alone, on what is encoded already."""
        total_steps, start = self.replanned(config)
        return dataclasses.replace(self, total_steps=total_steps, start=start)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The data of a run as tokens, and the steps that they are planned into; () for prompts, which are drawn."""

    items: data.Items
    report: data.EncodeReport
    steps: Sequence[data.Step]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """All that the rest of jlora has to know about an algorithm: a row of `jlora.train.algorithms.ALGORITHMS`.

    Attributes:
        plan: (settings, tokenizer, note) → the plan of a run.
        fullest: (settings) → the plan of a one-step run on the most data that they allow.
        groups: the classes of the groups of settings that it has in addition to those of every run, by name.
        faults: (settings) → what is wrong with them that no group can see alone.
        samples: its data are prompts, whose completions are sampled from the policy; a task may provide them.
        branches: the documents of a row may be branches that share a prompt, rather than independent.
        scores: what it trains has a score head: a reward model, not a policy.
        policy: where the policy's adapter is among the trained weights.
        reads_once: the trained weights read each token of the data once, and nothing else does.
        refers: its loss compares the policy with the reference policy, which full fine-tuning then holds too.
        side_by_side: several adapters can be trained by it in one run.
    """

    plan: Callable[[SharedConfig, Any, Note], Plan]
    fullest: Callable[[SharedConfig], Plan]
    groups: Mapping[str, type] = dataclasses.field(default_factory=dict)
    faults: Callable[[SharedConfig], list[str]] = lambda config: []
    samples: bool = False
    branches: bool = True
    scores: bool = False
    policy: tuple[str, ...] = ()
    reads_once: bool = False
    refers: bool = False
    side_by_side: bool = False
