"""The loader: a plan and its examples become a resumable grain iterator of arrays [A, B, T]."""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from jlora.data.chat import EncodeReport, Example
from jlora.data.packing import Step

Batch = dict[str, np.ndarray]


def loader(examples: Sequence[Example], steps: Sequence[Step], grad_accum: int = 1) -> grain.DatasetIterator:
    """A grain iterator over the steps' batches; `get_state()` and `set_state(state)` resume it exactly.

    Each item is what `collate` returns.
    """
    return batches(steps, lambda step: collate(examples, step, grad_accum), grad_accum)


def batches(steps: Sequence[Step], collate_step: Callable[[Step], Batch], grad_accum: int) -> grain.DatasetIterator:
    """The resumable iterator over what `collate_step` makes of each step."""
    if uneven := sorted({len(step.rows) for step in steps if len(step.rows) % grad_accum}):
        raise ValueError(f"found steps of {uneven} rows, expected a multiple of grad_accum={grad_accum}")
    dataset = grain.MapDataset.source(steps).map(collate_step)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def describe(report: EncodeReport, steps: Sequence[Step]) -> str:
    """What will be trained on, in words, after the number of examples."""
    text = (
        f"{report.tokens:,} tokens of which {report.trained_tokens:,} are trained; {len(steps)} steps, rows of "
        f"{', '.join(str(length) for length in sorted({step.length for step in steps}))} tokens"
    )
    lost = {
        "cut at seq_len": report.cut,
        "dropped as too long": report.dropped,
        "without a trained token": report.untrained,
    }
    return "; ".join([text, *(f"{count} {what}" for what, count in lost.items() if count)])


def collate(examples: Sequence[Example], step: Step, grad_accum: int = 1) -> Batch:
    """The arrays of one step, each [A, B, T], A micro-batches of B rows.

    tokens        i32   what the model reads
    targets       i32   the next token of the same document
    weights       f32   1 where the loss on the target counts, else 0
    positions     i32   from 0 in each document
    segment_ids   i32   1, 2, ... for the documents of a row, 0 for padding
    """
    shape = (len(step.rows), step.length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = np.zeros(shape, np.float32)
    for row, indices in enumerate(step.rows):
        start = 0
        for segment, index in enumerate(indices, start=1):
            example = examples[index]
            length = len(example.tokens)
            place, before = (row, slice(start, start + length)), (row, slice(start, start + length - 1))
            batch["tokens"][place] = example.tokens
            batch["targets"][before] = example.tokens[1:]
            batch["weights"][before] = example.trained[1:]
            batch["positions"][place] = np.arange(length)
            batch["segment_ids"][place] = segment
            start += length
    return {name: array.reshape(grad_accum, -1, step.length) for name, array in batch.items()}
