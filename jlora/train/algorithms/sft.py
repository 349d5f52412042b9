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
    settings = dict(
        seq_len=config.train.seq_len,
        overlong=config.data.overlong,
        completion_only=config.data.completion_only,
        on_error=config.data.on_error,
    )

    def encode(writer: data.Writer, note: Note) -> tuple[data.Examples, data.EncodeReport]:
        records = data.iterate_records(config.data.path, on_error=config.data.on_error, note=note)
        return data.encode(records, tokenizer, note=note, writer=writer, progress=told, **settings)

    told = files.Told(note, "records encoded")
    examples, encoded = data.cached(config.data.cache, config.data.path, tokenizer, settings, encode, note)
    items = data.Singles(examples)
    held_out = _held_out(config, tokenizer, note)
    start = functools.partial(_start, term, config, items, held_out)
    planned = files.plan(config, items, encoded, start, note, noun="examples")
    for remark in encoded.notes:
        note(remark)
    return dataclasses.replace(planned, held_out=held_out)


def _fullest(term: Term, config: SharedConfig) -> Plan:
    """A plan of one step on rows without padding; no data needs more memory."""
    train = config.train
    items = [data.Item((data.filled(train.seq_len),))] * (train.batch_size * train.grad_accum)
    return files.fullest(config, items, functools.partial(_start, term, config, items, ()))


def _start(
    term: Term,
    config: SharedConfig,
    items: Sequence[data.Item],
    held_out: Sequence[data.Record],
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


def _held_out(config: SharedConfig, tokenizer: Any, note: Note) -> list[data.Record]:
    """The records of `data.eval_path`, checked before the run begins; none without that setting."""
    if not config.data.eval_path:
        return []
    settings = {"on_error": config.data.on_error, "note": note}
    return data.encodable(data.read_records(config.data.eval_path, **settings), tokenizer, **settings)


def _evaluate(config: SharedConfig, base: Base, records: Sequence[data.Record], state: TrainState) -> Numbers:
    params = lora.combine(base.frozen, state.trainable)
    rows, seq_len = config.train.batch_size, config.train.seq_len
    return completion_loss(
        base.model, params, base.tokenizer, records, batch_size=rows, seq_len=seq_len, mesh=base.mesh
    )


SFT = algorithm(unchanged)
