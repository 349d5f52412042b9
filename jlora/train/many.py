"""Several adapters of one base, trained side by side in one jitted step, each as if it were trained alone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import data, lora, sharding, tree
from jlora.errors import number_of
from jlora.optim import make_optimizer, own_optim
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

    Adapters with the same settings of data share what is encoded and, with the same seed, the batches too.

    Args:
        plan_one: (settings, tokenizer, note) → the plan of one adapter trained alone.
        begun: for a resumed run, the frozen half of each adapter (`Job.fixed`) as the run began; {} for a new run.
    """
    notes = data.as_notes(note)
    members = config.members()

    def about(name: str) -> data.Notes:
        alike = [other for other in members if members[other].data == members[name].data]
        return notes if len(alike) == len(members) else notes.about(", ".join(alike))

    plans = _shared(members, lambda name: plan_one(members[name], tokenizer, about(name)))
    steps = max(one.total_steps for one in plans.values())
    longer = {name: _with_steps(members[name], steps) for name, one in plans.items() if one.total_steps < steps}
    for name in longer:
        note(f"{name}: has data for {number_of(plans[name].total_steps, 'step')}, and repeats it until step {steps}")
    members |= longer
    plans |= _shared(longer, lambda name: plans[name].again(longer[name]))

    def start(base: Base) -> Job:
        return _start(config, base, members, plans, note, begun)

    longest = max(one.longest for one in plans.values())
    return Plan(steps, start, longest, " ".join(one.tokens for one in plans.values()))


def _shared(members: Mapping[str, RunConfig], make: Callable[[str], Plan]) -> dict[str, Plan]:
    """Each adapter's plan: one per data and seed, of which `make` encodes one per data."""
    plans: dict[str, Plan] = {}
    for name, member in members.items():
        alike = [other for other in plans if members[other].data == member.data]
        same = [other for other in alike if members[other].train == member.train]
        if same:
            plans[name] = plans[same[0]]
        else:
            plans[name] = plans[alike[0]].again(member) if alike else make(name)
    return plans


class Sources:
    """Joins the batches of K sources to [A, K, …], each padded with zeros (no tokens) to the step's largest.

    A source that several adapters share is read once for all of them.
    """

    boundary = ahead = True

    def __init__(self, sources: Mapping[str, FileSource], mesh: jax.sharding.Mesh) -> None:
        self._sources, self._mesh = sources, mesh

    def next(self, state: TrainState) -> tuple[Batch, int, Numbers]:
        """The next batches; the policies play no part."""
        batch, count = self.read()
        return sharding.put_batch(batch, self._mesh), count, {}

    def read(self) -> tuple[data.Batch, int]:
        """The next batches on the host, joined, and how many tokens they hold."""
        read = {key: source.read() for key, source in {id(one): one for one in self._sources.values()}.items()}
        batches, counts = zip(*(read[id(source)] for source in self._sources.values()), strict=True)
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
    note(f"{number_of(len(adapters), 'adapter')} side by side: {tree.count(trainable):,} trainable parameters in all")
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
        state = create_states(trainable, optimizer(optims), seeds, base.mesh)
        dropout = lora.drops(settings)
        skip = config.train.on_nonfinite == "skip"
        rates = np.asarray(optims.rates)

        def read(metrics: Metrics, number: int) -> Numbers:
            found = {}
            for place, name in enumerate(members):
                one = jax.tree.map(lambda leaf, place=place: np.asarray(leaf[place]), metrics)
                numbers = {"loss": float(one["loss"]), "grad_norm": float(one["grad_norm"])}
                found[name] = numbers | {"learning_rate": float(rates[place, number - 1])} | jobs[name].report(one)
            return _named(found)

        return Learning(state, make_steps(job.objective, optimizer, placement(state), dropout=dropout, skip=skip), read)

    first = next(iter(jobs.values()))
    steps = next(iter(plans.values())).total_steps
    optims = jax.tree.map(lambda *own: jnp.stack(own), *(own_optim(one.optim, steps) for one in members.values()))
    return Job(
        trainable=trainable,
        frozen={
            "base": base.frozen,
            "settings": base.place(settings, base.mesh),
            "optim": optims,
        },
        objective=first.objective,
        source=Sources(_sources(plans, jobs), base.mesh),
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


def _sources(plans: Mapping[str, Plan], jobs: Mapping[str, Job]) -> dict[str, FileSource]:
    """Each adapter's source: that of the first one with the same plan."""
    first = {id(plan): name for name, plan in reversed(plans.items())}
    return {name: jobs[first[id(plan)]].source for name, plan in plans.items()}


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
