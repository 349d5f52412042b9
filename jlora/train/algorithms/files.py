"""Runs on files: their examples are items, planned into the batches of a run before it begins."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jlora import data, sharding
from jlora.errors import UserError, number_of
from jlora.train.algorithms.algorithm import Base, Encoded, Job, Note, Numbers, Plan
from jlora.train.reporting.progress import Counting
from jlora.train.settings import SharedConfig
from jlora.train.state import TrainState
from jlora.train.step import Batch, Metrics

# (the steps of a run, base) → its job
Start = Callable[[Sequence[data.Step], Base], Job]
# (what takes the items, what takes notes, what is told the number of records done) → the items and a report
Encode = Callable[[data.Writer, Note, data.Progress], tuple[data.Items, data.EncodeReport]]


def encoded(
    config: SharedConfig,
    sources: data.Sources | None,
    tokenizer: Any,
    settings: Mapping[str, Any],
    encode: Encode,
    note: Note,
    *,
    what: str,
) -> tuple[data.Items, data.EncodeReport]:
    """The items of files and a report, from the cache or encoded now, as `data.cached` says.

    Args:
        sources: None for data that no file holds; they are not cached.
        settings: what `encode` depends on besides sources and tokenizer; JSON.
        what: what is encoded: "records".
    """
    reading, counting = sources and sources.reading, data.as_notes(note).counting

    def make(writer: data.Writer, kept: Note) -> tuple[data.Items, data.EncodeReport]:
        title = f"encoding {what}{f' of {sources}' if sources else ''}"
        with counting(title) if counting else Counting(title, note) as told:
            return encode(writer, kept, lambda done: told(done, reading and reading.share))

    if sources is None:
        return make(data.Writer(), note)
    if jax.process_count() > 1:
        data.require_same({f"contents of {name}": digest for name, digest in sources.digests().items()})
    return data.cached(config.data.cache, sources, tokenizer, {"what": what} | dict(settings), make, note)


def plan(
    config: SharedConfig,
    items: data.Items,
    report: data.EncodeReport,
    start: Start,
    note: Note,
    *,
    noun: str,
    share: bool = False,
    held_out: Sequence[data.Item] = (),
) -> Plan:
    """The run on these items, of which `noun` is the name of one.

    Args:
        share: see `data.plan_items`.
        held_out: the items of the evaluation, if it reads items.
    """
    require_all_sources(config, report)
    train, weights = config.train, config.data.train.weights
    mixture = dict(counts=report.sources, weights=weights) if weights else {}
    steps = _steps(config, items, share, train.epochs, train.steps, **mixture)
    note(f"{number_of(len(items), noun)}, {data.describe(report, steps)}")
    if weights:
        note(_describe_mixture(config, report.sources))
    longest = max(int(data.flat(some).lengths.max()) for some in (items, held_out) if some)

    def replanned(other: SharedConfig) -> tuple[int, Callable[[Base], Job]]:
        rows = _steps(other, items, share, other.train.epochs, other.train.steps, **mixture)
        return len(rows), functools.partial(start, rows)

    return Plan(
        len(steps),
        functools.partial(start, steps),
        longest,
        items.examples.checksum,
        encoded=Encoded(items, report, steps),
        replanned=replanned,
    )


def require_all_sources(config: SharedConfig, report: data.EncodeReport) -> None:
    """Raises UserError if nothing is left to train on of one of the run's sources."""
    names = list(config.data.train.sources)
    empty = [name for number, name in enumerate(names) if not any(report.sources[number : number + 1])]
    if empty:
        raise UserError(
            f"data.sources: nothing is left to train on of {', '.join(empty)}: all records are too long, or have no "
            "trained token; expected some of every source: raise train.seq_len, or leave the source out"
        )


def _describe_mixture(config: SharedConfig, counts: Sequence[int]) -> str:
    """A sentence on what an epoch holds of each source."""
    sources, total = config.data.train.sources, sum(config.data.train.weights)
    each = []
    for (name, source), count in zip(sources.items(), counts, strict=True):
        times = source.weight / total * sum(counts) / count
        each.append(f"{name} {source.weight / total:.1%} ({number_of(count, 'example')}, {times:.3g} times an epoch)")
    return f"a mixture of {', '.join(each)}"


def fullest(config: SharedConfig, items: Sequence[data.Item], start: Start, *, share: bool = False) -> Plan:
    """A plan of one step on these items, which have documents of the maximum length."""
    steps = _steps(config, items, share, None, 1)
    first = functools.partial(start, steps)
    return Plan(1, first, config.train.seq_len, replanned=lambda other: (1, first))


def in_order(config: SharedConfig, items: Sequence[data.Item], share: bool) -> Iterator[data.Batch]:
    """Every item once, in order, in batches of one micro-batch."""
    train = config.train
    settings = dict(seq_len=train.seq_len, batch_size=train.batch_size, bucket=config.data.bucket)
    return data.in_order(items, share=share, **settings)


def _steps(
    config: SharedConfig,
    items: Sequence[data.Item],
    share: bool,
    epochs: int | float | None,
    steps: int | None,
    **mixture: Any,
) -> data.Steps:
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
        **mixture,
    )


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
