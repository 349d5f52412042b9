"""Several adapters of one base, trained side by side in one jitted step, each as if it were trained alone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import data, lora, sharding, tree
from jlora.optim import learning_rates, make_optimizer
from jlora.train.adapt import adapt
from jlora.train.algorithms.algorithm import Base, Job, Learning, Note, Numbers, Plan, placement
from jlora.train.algorithms.files import FileSource
from jlora.train.config import RunConfig
from jlora.train.state import TrainState, create_states
from jlora.train.step import Batch, Metrics, make_steps
from jlora.types import Params

FOLDER = "adapters"


def plan(
    config: RunConfig,
    tokenizer: Any,
    note: Note,
    plan_one: Callable[[RunConfig, Any, Note], Plan],
    begun: Mapping[str, Params],
) -> Plan:
    """The run of all adapters in `config.adapters`, for as many steps as the longest of them would have alone.

    Args:
        plan_one: (settings, tokenizer, note) → the plan of one adapter trained alone.
        begun: for a resumed run, the frozen half of each adapter (`Job.fixed`) as the run began; {} for a new run.
    """
    notes = data.as_notes(note)
    members = config.members()
    plans = {name: plan_one(member, tokenizer, notes.about(name)) for name, member in members.items()}
    steps = max(one.total_steps for one in plans.values())
    for name, one in plans.items():
        if one.total_steps < steps:
            members[name] = _with_steps(members[name], steps)
            note(f"{name}: has data for {one.total_steps} steps, and repeats it until step {steps}")
            plans[name] = plan_one(members[name], tokenizer, lambda message: None)

    def start(base: Base) -> Job:
        return _start(config, base, members, plans, note, begun)

    longest = max(one.longest for one in plans.values())
    return Plan(steps, start, longest, " ".join(one.tokens for one in plans.values()))


class Sources:
    """Joins the batches of K sources to [A, K, …], each padded with zeros (no tokens) to the step's largest."""

    boundary = ahead = True

    def __init__(self, sources: Mapping[str, FileSource], mesh: jax.sharding.Mesh) -> None:
        self._sources, self._mesh = sources, mesh

    def next(self, state: TrainState) -> tuple[Batch, int, Numbers]:
        """The next batches; the policies play no part."""
        batch, count = self.read()
        return sharding.put_batch(batch, self._mesh), count, {}

    def read(self) -> tuple[data.Batch, int]:
        """The next batches on the host, joined, and how many tokens they hold."""
        batches, counts = zip(*(source.read() for source in self._sources.values()), strict=True)
        return {name: _joined([batch[name] for batch in batches]) for name in batches[0]}, sum(counts)

    def observe(self, metrics: Metrics) -> None:
        """Does nothing: there is nothing to check."""

    def get_state(self) -> dict[str, Any]:
        """The position of each source."""
        return {name: source.get_state() for name, source in self._sources.items()}

    def set_state(self, position: dict[str, Any]) -> None:
        """Goes to the position of each source."""
        for name, source in self._sources.items():
            source.set_state(position[name])


def _start(
    config: RunConfig,
    base: Base,
    members: Mapping[str, RunConfig],
    plans: Mapping[str, Plan],
    note: Note,
    begun: Mapping[str, Params],
) -> Job:
    adapters = {
        name: lora.adapter_leaves(adapt(base.model, base.frozen, member, begun.get(name)))
        for name, member in members.items()
    }
    settings, trainable = lora.split(lora.stack(adapters))
    note(f"{len(adapters)} adapters side by side: {tree.count(trainable):,} trainable parameters in all")
    jobs, own, fixed = {}, {}, {}
    for name, adapter in adapters.items():
        settings_of_one, own[name] = lora.split(adapter)
        fixed[name] = base.place(settings_of_one, base.mesh)
        frozen = lora.combine(base.frozen, fixed[name])
        jobs[name] = plans[name].start(dataclasses.replace(base, frozen=frozen, trainable=own[name]))

    def alone(stacked: Params) -> dict[str, Params]:
        return {name: lora.unstack(stacked, number, own[name]) for number, name in enumerate(members)}

    def evaluate(state: TrainState) -> Numbers:
        found = {
            name: jobs[name].evaluate(dataclasses.replace(state, trainable=one))
            for name, one in alone(state.trainable).items()
        }
        return _named(found)

    def learn(config: RunConfig, base: Base, job: Job, total_steps: int) -> Learning:
        optimizer = functools.partial(make_optimizer, config.optim, total_steps)
        seeds = [member.train.seed for member in members.values()]
        # Any factor: in the step each adapter has its own.
        state = create_states(trainable, optimizer(1.0), seeds, base.mesh)
        dropout = lora.drops(settings)
        skip = config.train.on_nonfinite == "skip"
        rates = {name: learning_rates(member.optim, total_steps) for name, member in members.items()}

        def read(metrics: Metrics, number: int) -> Numbers:
            found = {}
            for place, name in enumerate(members):
                one = jax.tree.map(lambda leaf, place=place: np.asarray(leaf[place]), metrics)
                numbers = {"loss": float(one["loss"]), "grad_norm": float(one["grad_norm"])}
                found[name] = numbers | {"learning_rate": float(rates[name][number - 1])} | jobs[name].report(one)
            return _named(found)

        return Learning(state, make_steps(job.objective, optimizer, placement(state), dropout=dropout, skip=skip), read)

    first = next(iter(jobs.values()))
    rates = [member.optim.learning_rate / config.optim.learning_rate for member in members.values()]
    return Job(
        trainable=trainable,
        frozen={
            "base": base.frozen,
            "settings": base.place(settings, base.mesh),
            "rate": jnp.asarray(rates, jnp.float32),
        },
        objective=first.objective,
        source=Sources({name: job.source for name, job in jobs.items()}, base.mesh),
        report=lambda metrics: {},
        adapters=lambda stacked: {
            f"{FOLDER}/{name}": params
            for name, one in alone(stacked).items()
            for params in jobs[name].adapters(one).values()
        },
        evaluate=evaluate,
        panels=(("Loss of each adapter", tuple(f"loss/{name}" for name in members)), *first.panels),
        fixed=fixed,
        learn=learn,
    )


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps, epochs=None))


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """The K sources' arrays [A, …] as one array [A, K, …], zero-padded."""
    shape = np.max([array.shape for array in arrays], axis=0)
    padded = [
        np.pad(array, [(0, full - own) for own, full in zip(array.shape, shape, strict=True)]) for array in arrays
    ]
    return np.stack(padded, axis=1)


def _named(found: Mapping[str, Numbers]) -> Numbers:
    """Each number's mean over the adapters where it is finite, and each adapter's own number as NAME/ADAPTER."""
    first = next(iter(found.values()))
    means = {key: _mean([numbers[key] for numbers in found.values()]) for key in first}
    return means | {f"{key}/{name}": numbers[key] for key in first for name, numbers in found.items()}


def _mean(values: list[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else np.nan
