"""A step of a plan and its documents become arrays [A, B, T]; `items` has the loader."""

from collections.abc import Sequence

import numpy as np

from jlora.data.chat import EncodeReport
from jlora.data.packing import Step, Steps
from jlora.data.store import Example, common_start
from jlora.errors import number_of
from jlora.types import BRANCH

Batch = dict[str, np.ndarray]


def filled(length: int, prompt: int = 0) -> Example:
    """A document of `length` tokens, all trained except a prompt of `prompt` tokens: the most that data can demand.

    Without a prompt it shares nothing with other documents.
    """
    return Example(np.zeros(length, np.int32), np.arange(length) >= prompt)


def describe(report: EncodeReport, steps: Steps) -> str:
    """A sentence on what will be trained on, to follow the number of examples."""
    text = (
        f"{number_of(report.tokens, 'token')} of which {report.trained_tokens:,} are trained; "
        f"{number_of(len(steps), 'step')}, rows of "
        f"{', '.join(str(length) for length in np.unique(steps.lengths).tolist())} tokens"
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
    segment_ids   i32   1, 2, ... for the documents of a row, or for the common start of a group of documents, which are
                        then its branches (`jlora.types.BRANCH`); 0 for padding
    """
    return lay_out(examples, step, grad_accum)[0]


def lay_out(examples: Sequence[Example], step: Step, grad_accum: int = 1) -> tuple[Batch, np.ndarray]:
    """What `collate` returns, and each token's document, int32 [A, B, T].

    A document is given as its place in the row's tuple, or -1 for padding and shared tokens.
    """
    shape = (len(step.rows), step.length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = np.zeros(shape, np.float32)
    owners = np.full(shape, -1, np.int32)

    def put(row: int, start: int, example: Example, skipped: int, segment: int, owner: int) -> int:
        """Writes a document without its first `skipped` tokens; returns where the next one goes."""
        end = start + len(example.tokens) - skipped
        place, before = (row, slice(start, end)), (row, slice(start, end - 1))
        batch["tokens"][place] = example.tokens[skipped:]
        batch["targets"][before] = example.tokens[skipped + 1 :]
        batch["weights"][before] = example.trained[skipped + 1 :]
        batch["positions"][place] = np.arange(skipped, len(example.tokens))
        batch["segment_ids"][place] = segment
        owners[place] = owner
        return end

    for row, indices in enumerate(step.rows):
        start = first = 0
        sizes = (1,) * len(indices) if step.groups is None else step.groups[row]
        for segment, size in enumerate(sizes, start=1):
            group = [examples[index] for index in indices[first : first + size]]
            shared = common_start(group)
            if shared:
                start = put(row, start, Example(group[0].tokens[:shared], np.zeros(shared, np.bool_)), 0, segment, -1)
            for number, example in enumerate(group, start=1):
                branch = number * BRANCH if size > 1 else 0
                start = put(row, start, example, shared, segment + branch, first + number - 1)
            first += size
    micro = (grad_accum, -1, step.length)
    return {name: array.reshape(micro) for name, array in batch.items()}, owners.reshape(micro)
