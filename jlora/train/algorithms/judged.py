"""Algorithms that learn from judged answers: what they share, from the data of a run to its evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jlora import data, lora, sharding
from jlora.models import Model
from jlora.train.algorithms import files
from jlora.train.algorithms.algorithm import Algorithm, Base, Job, Note, Numbers, Plan
from jlora.train.settings import SharedConfig
from jlora.train.state import TrainState
from jlora.train.step import Batch, Metrics, Objective

Items = Sequence[data.Item]


def shared(config: SharedConfig) -> bool:
    """Whether the answers to a prompt share one copy of it: as the data settings say."""
    return config.data.share_prompts


@dataclasses.dataclass(frozen=True)
class Method:
    """What distinguishes one algorithm on judged answers from another.

    Attributes:
        kind: of data, "pairs" or "unpaired".
        objective: (model, settings) → what is minimised.
        report: (a step's metrics) → numbers for the log.
        panels: panels of curves.png.
        shares: (settings) → whether the answers to a prompt share one copy of it.
        arrange: (settings) → (the items as encoded) → the items to train on, one after another.
        arranged: (settings) → what the arrangement depends on, as JSON.
        check: (settings, items, held-out items) → None; raises UserError if the data do not fit the settings.
        reference: (settings, items) → the reference policy in words; None if there is none.
        complete: (settings, base, items) → the items with the values that only a model gives.
        values: (settings) → what the items of `fullest` bring besides their documents.
        finish: (base, metrics of the evaluation) → None, called at the end if there is evaluation data.
    """

    kind: Literal["pairs", "unpaired"]
    objective: Callable[[Model, SharedConfig], Objective]
    report: Callable[[Metrics], Numbers]
    panels: tuple[tuple[str, tuple[str, ...]], ...]
    shares: Callable[[SharedConfig], bool] = shared
    arrange: Callable[[SharedConfig], data.Arrange] = lambda config: iter
    arranged: Callable[[SharedConfig], Any] = lambda config: None
    check: Callable[[SharedConfig, Items, Items], None] = lambda config, items, held_out: None
    reference: Callable[[SharedConfig, Items], str] | None = None
    complete: Callable[[SharedConfig, Base, Items], Items] = lambda config, base, items: items
    values: Callable[[SharedConfig], Mapping[str, float]] = lambda config: {}
    finish: Callable[[Base, Metrics], None] | None = None


def algorithm(method: Method, groups: Mapping[str, type], *, scores: bool = False) -> Algorithm:
    """The algorithm of a method, for the table; see `Algorithm` for `groups` and `scores`."""
    return Algorithm(
        plan=functools.partial(plan, method),
        fullest=functools.partial(fullest, method),
        groups=groups,
        scores=scores,
        refers=method.reference is not None,
    )


def plan(method: Method, config: SharedConfig, tokenizer: Any, note: Note) -> Plan:
    """The run on the preferences of `data.path`."""
    read = functools.partial(_read_items, method, config, tokenizer, note)
    items, report = read(config.data.train)
    held_out = read(config.data.evaluation, keep=True)[0] if config.data.evaluation else ()
    method.check(config, items, held_out)
    start = functools.partial(_start, method, config, items, held_out, note)
    noun, share = "pair" if method.kind == "pairs" else "answer", method.shares(config)
    planned = files.plan(config, items, report, start, note, noun=noun, share=share, held_out=held_out)
    records = data.flat(held_out).records if held_out else ()
    return dataclasses.replace(planned, held_out=list(map(_answered, filter(_wanted, records))))


def fullest(method: Method, config: SharedConfig) -> Plan:
    """A plan of one step on items of documents of the maximum length that share nothing; no data needs more memory."""
    train = config.train
    documents = (data.filled(train.seq_len),) * _sides(method)
    item = data.Item(documents, method.values(config))
    items = data.flat(list(method.arrange(config)(iter([item] * (2 * train.batch_size * train.grad_accum)))))
    start = functools.partial(_start, method, config, items, (), lambda message: None)
    return files.fullest(config, items, start, share=method.shares(config))


def _wanted(record: data.Record) -> bool:
    """Whether the record has an answer to learn, unlike an unpaired one that is to be avoided."""
    return bool(record.get("label", True))


def _answered(record: data.Record) -> data.Record:
    """The record with its wanted answer as the completion of its prompt."""
    return {"completion": record["chosen"]} | record if "chosen" in record else record


def _sides(method: Method) -> int:
    """How many documents of each item are data."""
    return 2 if method.kind == "pairs" else 1


def _start(
    method: Method,
    config: SharedConfig,
    items: Items,
    held_out: Items,
    note: Note,
    steps: Sequence[data.Step],
    base: Base,
) -> Job:
    objective = method.objective(base.model, config)
    if method.reference:
        note(f"the reference policy is {method.reference(config, items)}")
    items, held_out = (method.complete(config, base, some) for some in (items, held_out))
    score = sharding.jit(_scorer(objective))
    evaluate = functools.partial(_evaluate, score, base, held_out, config, method.shares(config))
    batches = data.loader(items, steps, config.train.grad_accum)
    return Job(
        trainable=base.trainable,
        frozen=base.constants,
        objective=objective,
        source=files.FileSource(batches, base.mesh, sides=_sides(method)),
        report=method.report,
        adapters=lambda trainable: {"adapter": lora.combine(base.frozen, trainable)},
        evaluate=lambda state: _numbers(method, evaluate(state)),
        panels=method.panels,
        finish=lambda state: method.finish(base, evaluate(state)) if method.finish and held_out else None,
    )


def _read_items(
    method: Method, config: SharedConfig, tokenizer: Any, note: Note, sources: data.Sources, keep: bool = False
) -> tuple[data.Items, data.EncodeReport]:
    """The items of sources, and a report on their encoding; with `keep`, the items have their records."""
    on_error = config.data.on_error
    settings = dict(seq_len=config.train.seq_len, overlong=config.data.overlong, on_error=on_error, keep=keep)

    def encode(writer: data.Writer, note: Note, progress: data.Progress) -> tuple[data.Items, data.EncodeReport]:
        records = data.iterate_preferences(sources, method.kind, on_error=on_error, note=note)
        common = dict(note=note, writer=writer, progress=progress, divide=True, arrange=method.arrange(config))
        return data.encode_preferences(records, tokenizer, method.kind, **common, **settings)

    key = settings | {"kind": method.kind, "arranged": method.arranged(config)}
    items, report = files.encoded(config, sources, tokenizer, key, encode, note, what="judged answers")
    for remark in report.notes:
        note(remark)
    return items, report


def _evaluate(
    score: Callable, base: Base, items: Items, config: SharedConfig, share: bool, state: TrainState
) -> Metrics:
    """The metrics of all items as if they were one step: sums are added, arrays of items concatenated.

    The loss is the mean of the batches' losses, weighted by their numbers of items.

    Args:
        score: see `_scorer`.
    """
    found = []
    for batch in files.in_order(config, items, share):
        value, report = score(state.trainable, base.constants, sharding.put_batch(batch, base.mesh))
        weight = float(np.sum(batch["items"]))
        found.append(sharding.on_host((value * weight, weight, report)))
    loss = sum(value for value, _, _ in found) / sum(weight for _, weight, _ in found)
    sums = jax.tree.map(lambda *values: np.asarray(np.sum(values, axis=0)), *(report.sums for _, _, report in found))
    arrays = jax.tree.map(lambda *values: np.concatenate(values), *(report.items for _, _, report in found))
    return sums | arrays | {"loss": np.asarray(loss)}


def _scorer(objective: Objective) -> Callable:
    """score(trainable, frozen, batch of one micro-batch) → (loss, report), without gradients or dropout."""

    def score(trainable: Any, frozen: Any, batch: Batch) -> Any:
        micro = jax.tree.map(lambda leaf: leaf[0], batch)
        return objective.loss(trainable, frozen, micro, objective.totals(batch), None)

    return score


def _numbers(method: Method, metrics: Metrics) -> Numbers:
    return {"loss": float(metrics["loss"])} | method.report(metrics)
