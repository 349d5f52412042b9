"""The plan of a run: which examples share a row, which rows share a step, and how long rows are. No tokens involved."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import SupportsIndex, overload

import numpy as np

from jlora.data.mixing import generator, mixed
from jlora.errors import UserError

# Rows are filled from this many examples of the shuffled order at a time: enough to fill them well, and few enough
# that different examples meet from epoch to epoch.
PACKING_WINDOW = 8192
# Without packing, this many steps' worth of examples are sorted by length, so that a step has rows of similar length.
SORTING_WINDOW = 32
MAX_SHAPES = 16
MOST_ROWS = 1 << 26  # of a whole plan, which memory holds
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


class Rows:
    """Rows of numbers, which lie one after another: four bytes a number, and eight a row."""

    def __init__(self, members: np.ndarray, bounds: np.ndarray) -> None:
        """`bounds` says where each row begins, and where the last one ends."""
        self.members, self.bounds = members, bounds

    @classmethod
    def empty(cls) -> "Rows":
        """No rows."""
        return cls(np.zeros(0, np.int32), np.zeros(1, np.int64))

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Rows":
        """These rows."""
        members = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
        return cls(members, np.cumsum([0, *map(len, rows)], dtype=np.int64))

    @classmethod
    def of_one(cls, members: np.ndarray) -> "Rows":
        """A row for each of these numbers."""
        return cls(members.astype(np.int32), np.arange(len(members) + 1))

    @classmethod
    def joined(cls, given: Sequence["Rows"]) -> "Rows":
        """The rows of all."""
        sizes = np.concatenate([np.diff(rows.bounds) for rows in given] or [np.zeros(0, np.int64)])
        members = np.concatenate([rows.members for rows in given] or [np.zeros(0, np.int32)])
        return cls(members, np.concatenate([[0], np.cumsum(sizes)]))

    def take(self, order: np.ndarray) -> "Rows":
        """The rows at these places."""
        sizes = np.diff(self.bounds)[order]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        places = np.repeat(self.bounds[order] - bounds[:-1], sizes) + np.arange(bounds[-1])
        return Rows(self.members[places], bounds)

    def padded(self, count: int) -> "Rows":
        """So many rows: these, and empty ones."""
        return Rows(self.members, np.pad(self.bounds, (0, count - len(self)), mode="edge"))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of the values at each row's numbers."""
        ends = np.concatenate([[0], np.cumsum(values[self.members])])
        return ends[self.bounds[1:]] - ends[self.bounds[:-1]]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, place: int) -> Row:
        return tuple(self.members[self.bounds[place] : self.bounds[place + 1]].tolist())


class Steps(Sequence[Step]):
    """Steps of equally many rows, which exist only while somebody looks at them.

    Attributes:
        lengths: tokens of the rows of each step.
    """

    def __init__(
        self, rows: Rows, size: int, lengths: np.ndarray, shape: Callable[[Step], Step] = lambda step: step
    ) -> None:
        """`shape` is what becomes of a step of `size` rows when it is looked at."""
        self.lengths, self._rows, self._size, self._shape = lengths, rows, size, shape

    def shaped(self, shape: Callable[[Step], Step]) -> "Steps":
        """What this makes of each step; it leaves the length of rows as it is."""
        return Steps(self._rows, self._size, self.lengths, shape)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Step | list[Step]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        rows = tuple(self._rows[row] for row in range(place * self._size, (place + 1) * self._size))
        return self._shape(Step(rows, int(self.lengths[place])))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


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
) -> Steps:
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
    planned, count, carried = [], 0, Rows.empty()
    for epoch in itertools.count():
        share = 1.0 if epochs is None else min(1.0, epochs - epoch)
        if share <= 0:
            break
        order = mixed(counts, weights, seed, epoch) if weights else np.arange(len(lengths))
        if shuffle:
            order = generator(seed, epoch, ORDER).permutation(order)
        for_rows = generator(seed, epoch, ROWS)
        rows = _pack(order, lengths, seq_len) if packing else Rows.of_one(order)
        if packing and shuffle:
            rows = rows.take(for_rows.permutation(len(rows)))
        taken = -(-(len(carried) + max(1, round(share * len(rows)))) // batch_size)
        # The step with the carried rows is not shuffled: a run that ends with the previous epoch ends with these rows.
        opening = batch_size if len(carried) and len(carried) + len(rows) >= batch_size else 0
        rows = Rows.joined([carried, rows])
        groups = len(rows) // batch_size
        full = groups * batch_size
        places = np.arange(full)
        if shuffle and not packing:
            places[opening:] = opening + _grouped(rows.sums(lengths)[opening:full], batch_size, for_rows)
        planned.append(rows.take(places[: taken * batch_size]))
        count += min(taken, groups)
        carried = rows.take(np.arange(full, len(rows))) if taken > groups or share == 1 else Rows.empty()
        if steps is not None and count >= steps:
            carried = Rows.empty()
            break
    if len(carried):
        planned.append(carried.padded(batch_size))
    rows = Rows.joined(planned)
    rows = rows.take(np.arange(len(rows))[: None if steps is None else steps * batch_size])
    longest = rows.sums(lengths).reshape(-1, batch_size).max(axis=1)
    return Steps(rows, batch_size, np.minimum(seq_len, -(-longest // bucket) * bucket))


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
    most = [one for one in (steps and steps * batch_size, epochs and epochs * len(lengths)) if one is not None]
    if most and not min(most) <= MOST_ROWS:
        faults.append(
            f"found {min(most):.3g} rows in all, expected at most {MOST_ROWS:,}: a run is planned before its first "
            "step; lower its steps or epochs"
        )
    if not len(lengths):
        faults.append("found no examples, expected at least one")
    elif lengths.min() < 1 or lengths.max() > seq_len:
        faults.append(f"found lengths of {lengths.min()} to {lengths.max()} tokens, expected 1 to seq_len={seq_len}")
    if faults:
        raise UserError("the batches cannot be planned:\n  " + "\n  ".join(faults))


def _pack(order: np.ndarray, lengths: np.ndarray, seq_len: int) -> Rows:
    found = []
    for start in range(0, len(order), PACKING_WINDOW):
        window = order[start : start + PACKING_WINDOW]
        found.append(Rows.of(_best_fit(window[np.argsort(-lengths[window], kind="stable")].tolist(), lengths, seq_len)))
    return Rows.joined(found)


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


def _grouped(row_lengths: np.ndarray, batch_size: int, generator: np.random.Generator) -> np.ndarray:
    """An order in which rows of similar length share a step and steps are shuffled; there are rows for whole steps."""
    window = batch_size * SORTING_WINDOW
    orders = [
        start + np.argsort(row_lengths[start : start + window], kind="stable")
        for start in range(0, len(row_lengths), window)
    ]
    groups = np.concatenate([*orders, np.zeros(0, np.int64)]).reshape(-1, batch_size)
    return groups[generator.permutation(len(groups))].ravel()
