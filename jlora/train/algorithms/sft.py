"""Supervised fine-tuning: cross-entropy on the tokens that the data marks as trained.

Losses of the same data that are made of tokens' likelihoods differ only in their term: see `algorithm`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import data, lora
from jlora.losses import Term, cross_entropy, unchanged
from jlora.models import Model
from jlora.train.algorithms import files
from jlora.train.algorithms.algorithm import Algorithm, Base, Job, Note, Numbers, Plan
from jlora.train.evaluation.records import completion_loss
from jlora.train.settings import SharedConfig
from jlora.train.state import TrainState
from jlora.train.step import Batch, Metrics, Objective, Report
from jlora.types import Params


def algorithm(term: Term) -> Algorithm:
    """The algorithm that minimises the mean of the trained tokens' terms, which `cross_entropy` computes."""
    return Algorithm(
        functools.partial(_plan, term),
        functools.partial(_fullest, term),
        branches=False,
        reads_once=True,
        side_by_side=True,
    )


def _plan(term: Term, config: SharedConfig, tokenizer: Any, note: Note) -> Plan:
    """The run on the records of `data.path`; each is an item of one document."""
    items, report = _encoded(config, tokenizer, note, config.data.train, overlong=config.data.overlong, keep=False)
    for remark in report.notes:
        note(remark)
    held_out: data.Items | tuple[()] = ()
    if config.data.evaluation:
        held_out, _ = _encoded(config, tokenizer, note, config.data.evaluation, overlong="cut", keep=True)
    start = functools.partial(_start, term, config, items, held_out)
    planned = files.plan(config, items, report, start, note, noun="example", held_out=held_out)
    return dataclasses.replace(planned, held_out=held_out.records) if held_out else planned


def _encoded(
    config: SharedConfig, tokenizer: Any, note: Note, sources: data.Sources, *, overlong: str, keep: bool
) -> tuple[data.Items, data.EncodeReport]:
    """The items of sources and a report; with `keep`, the items have their records, as metrics need them."""
    settings = dict(
        seq_len=config.train.seq_len,
        overlong=overlong,
        completion_only=config.data.completion_only_of(sources),
        window_overlap=config.data.window_overlap,
        on_error=config.data.on_error,
        keep=keep,
    )

    def encode(writer: data.Writer, note: Note, progress: data.Progress) -> tuple[data.Items, data.EncodeReport]:
        records = data.iterate_records(sources, on_error=config.data.on_error, note=note)
        return data.encode_items(
            records, tokenizer, note=note, writer=writer, progress=progress, divide=True, **settings
        )

    return files.encoded(config, sources, tokenizer, settings, encode, note, what="records")


def _fullest(term: Term, config: SharedConfig) -> Plan:
    """A plan of one step on rows without padding; no data needs more memory."""
    train = config.train
    items = [data.Item((data.filled(train.seq_len),))] * (train.batch_size * train.grad_accum)
    return files.fullest(config, items, functools.partial(_start, term, config, items, ()))


def _start(
    term: Term,
    config: SharedConfig,
    items: Sequence[data.Item],
    held_out: Sequence[data.Item],
    steps: Sequence[data.Step],
    base: Base,
) -> Job:
    batches = data.loader(items, steps, config.train.grad_accum, by_item=False)
    return Job(
        trainable=base.trainable,
        frozen=base.frozen,
        objective=sft_loss(base.model, term=term, remat=config.train.remat),
        source=files.FileSource(batches, base.mesh),
        report=_report,
        adapters=lambda trainable: {"adapter": lora.combine(base.frozen, trainable)},
        evaluate=functools.partial(_evaluate, config, base, held_out),
        panels=(("Tokens per second", ("tokens_per_second",)),),
    )


def sft_loss(model: Model, *, term: Term = unchanged, remat: bool | str = True, chunk: int = 512) -> Objective:
    """The objective of the mean negative log-likelihood, or what `term` makes of it, of a step's trained tokens.

    It reports the sums that its metrics are computed from.
    """

    def loss(
        trainable: Params, frozen: Params, batch: Batch, totals: Metrics, key: jax.Array | None
    ) -> tuple[jax.Array, Report]:
        params = lora.combine(frozen, trainable)
        hidden, _ = model.hidden(
            params, batch["tokens"], batch["positions"], batch["segment_ids"], key=key, remat=remat, branches=False
        )
        targets, weights = batch["targets"], batch["weights"]
        sums = cross_entropy(model.project, model.head(params), hidden, targets, weights, term=term, chunk=chunk)
        return sums.loss / totals["tokens"], Report({"correct": sums.correct, "weight": sums.weight})

    return Objective(loss, lambda batch: {"tokens": jnp.maximum(jnp.sum(batch["weights"]), 1)})


def _report(metrics: Metrics) -> Numbers:
    return {"mean_token_accuracy": float(metrics["correct"] / max(float(metrics["weight"]), 1.0))}


def _evaluate(config: SharedConfig, base: Base, held_out: Sequence[data.Item], state: TrainState) -> Numbers:
    params = lora.combine(base.frozen, state.trainable)
    rows, seq_len = config.train.batch_size, config.train.seq_len
    examples = data.flat(held_out).examples
    return completion_loss(base.model, params, examples, batch_size=rows, seq_len=seq_len, mesh=base.mesh)


SFT = algorithm(unchanged)
