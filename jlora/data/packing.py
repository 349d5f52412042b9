"""The plan of a run: which examples share a row, which rows share a step, and how long rows are. No tokens involved."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jlora.data.mixing import generator, mixed
from jlora.errors import UserError

# Rows are filled from this many examples of the shuffled order at a time: enough to fill them well, and few enough
# that different examples meet from epoch to epoch.
PACKING_WINDOW = 8192
# Without packing, this many steps' worth of examples are sorted by length, so that a step has rows of similar length.
SORTING_WINDOW = 32
MAX_SHAPES = 16
ORDER, ROWS = 0, 1  # what random numbers are for

Row = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """The rows of one optimizer step.

    Attributes:
        rows: for each row, the indices of its examples; an empty tuple is a row of padding.
        length: tokens of each row.
        groups: for each row, the sizes of its groups of consecutive examples that share one copy of their common start;
            None if every example has its own.
    """

    rows: tuple[Row, ...]
    length: int
    groups: tuple[tuple[int, ...], ...] | None = None


def plan(
    lengths: Sequence[int] | np.ndarray,
    *,
    seq_len: int,
    batch_size: int,
    packing: bool,
    bucket: int = 64,
    seed: int = 0,
    epochs: int | float | None = None,
    steps: int | None = None,
    shuffle: bool = True,
    counts: Sequence[int] = (),
    weights: Sequence[float] = (),
) -> list[Step]:
    """The steps of a run, the same on every platform for the same arguments.

    Every example is in exactly one row of each epoch, unless sources have weights (`jlora.data.mixing.mixed`). Rows
    left over at the end of an epoch come first in the next one; at the very end, empty rows fill the last step. A
    fractional epoch takes that part of the epoch's rows, rounded up to steps. So a longer run begins with the steps of
    a shorter one, and fills the last of those if it was not full.

    Args:
        lengths: tokens of each example, at most `seq_len`.
        batch_size: rows of a step (over all accumulated micro-batches).
        bucket: row lengths are multiples of this, or of its least multiple that leaves at most `MAX_SHAPES` shapes.
        epochs, steps: the run ends at whichever comes first; at least one must be given.
        shuffle: False keeps the order of the examples from row to row (for evaluation).
        counts, weights: how many examples each source of a mixture has, and its share of those of an epoch; no weights:
            all come once.

    Raises:
        UserError: arguments out of range, no examples, or examples longer than `seq_len`; all are listed.
    """
    lengths = np.asarray(lengths, np.int64)
    _check(lengths, seq_len=seq_len, batch_size=batch_size, bucket=bucket, epochs=epochs, steps=steps)
    bucket *= -(-seq_len // (bucket * MAX_SHAPES))
    planned: list[Step] = []
    carried: list[Row] = []
    for epoch in itertools.count():
        share = 1.0 if epochs is None else min(1.0, epochs - epoch)
        if share <= 0:
            break
        order = mixed(counts, weights, seed, epoch) if weights else np.arange(len(lengths))
        if shuffle:
            order = generator(seed, epoch, ORDER).permutation(order)
        for_rows = generator(seed, epoch, ROWS)
        if packing:
            rows = _pack(order, lengths, seq_len)
            if shuffle:
                rows = [rows[index] for index in for_rows.permutation(len(rows))]
        else:
            rows = [(int(index),) for index in order]
        taken = -(-(len(carried) + max(1, round(share * len(rows)))) // batch_size)
        # The step with the carried rows is not shuffled: a run that ends with the previous epoch ends with these rows.
        opening = batch_size if carried and len(carried) + len(rows) >= batch_size else 0
        rows = carried + rows
        full = len(rows) - len(rows) % batch_size
        groups = [rows[:opening]] if opening else []
        groups += _group(rows[opening:full], lengths, batch_size, for_rows if shuffle and not packing else None)
        planned += [_step(group, lengths, bucket, seq_len) for group in groups[:taken]]
        carried = rows[full:] if taken > len(groups) or share == 1 else []
        if steps is not None and len(planned) >= steps:
            return planned[:steps]
    if carried:
        planned.append(_step(carried + [()] * (batch_size - len(carried)), lengths, bucket, seq_len))
    return planned[:steps]


def _check(
    lengths: np.ndarray, *, seq_len: int, batch_size: int, bucket: int, epochs: int | float | None, steps: int | None
) -> None:
    faults = [
        f"{name}: found {value}, expected a number above 0"
        for name, value in [
            ("seq_len", seq_len),
            ("batch_size", batch_size),
            ("bucket", bucket),
            ("epochs", epochs),
            ("steps", steps),
        ]
        if value is not None and value <= 0
    ]
    if epochs is None and steps is None:
        faults.append("found neither epochs nor steps, expected at least one of them to say how long the run is")
    if not len(lengths):
        faults.append("found no examples, expected at least one")
    elif lengths.min() < 1 or lengths.max() > seq_len:
        faults.append(f"found lengths of {lengths.min()} to {lengths.max()} tokens, expected 1 to seq_len={seq_len}")
    if faults:
        raise UserError("the batches cannot be planned:\n  " + "\n  ".join(faults))


def _pack(order: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[Row]:
    rows: list[Row] = []
    for start in range(0, len(order), PACKING_WINDOW):
        window = order[start : start + PACKING_WINDOW]
        rows += _best_fit(window[np.argsort(-lengths[window], kind="stable")].tolist(), lengths, seq_len)
    return rows


def _best_fit(indices: list[int], lengths: np.ndarray, seq_len: int) -> list[Row]:
    """Rows by best-fit-decreasing: each example goes to the fullest row that still has room.

    Bit r of `rooms` says whether some row has room for exactly r more tokens, so the fullest row that fits is the
    lowest bit set at or above the length: a shift and a mask, where a scan over all rows would be quadratic.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms = 0
    for index, length in zip(indices, lengths[indices].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            rows_by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return [tuple(row) for row in rows]


def _group(
    rows: list[Row], lengths: np.ndarray, batch_size: int, generator: np.random.Generator | None
) -> list[list[Row]]:
    """The rows divided into steps; with a generator, rows of similar length share a step and steps are shuffled."""
    if generator is None:
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    row_lengths = _row_lengths(rows, lengths)
    window = batch_size * SORTING_WINDOW
    groups = []
    for start in range(0, len(rows), window):
        order = start + np.argsort(row_lengths[start : start + window], kind="stable")
        groups += [[rows[index] for index in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    return [groups[index] for index in generator.permutation(len(groups))]


def _row_lengths(rows: list[Row], lengths: np.ndarray) -> np.ndarray:
    return np.array([sum(int(lengths[index]) for index in row) for row in rows], np.int64)


def _step(rows: list[Row], lengths: np.ndarray, bucket: int, seq_len: int) -> Step:
    longest = int(_row_lengths(rows, lengths).max())
    return Step(tuple(rows), min(seq_len, -(-longest // bucket) * bucket))
