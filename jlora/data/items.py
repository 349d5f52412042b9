"""Items: units that a step must not split, such as the answers of a pair. Their plans and batches."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jlora.data.batches import Batch, collate, lay_out
from jlora.data.packing import Step, Steps, plan
from jlora.data.store import Example, Item, Items, common_start
from jlora.data.writer import flat
from jlora.errors import UserError


def plan_items(
    items: Sequence[Item],
    *,
    seq_len: int,
    batch_size: int,
    grad_accum: int = 1,
    packing: bool,
    bucket: int = 64,
    seed: int = 0,
    epochs: int | float | None = None,
    steps: int | None = None,
    shuffle: bool = True,
    share: bool = False,
    prompts: Sequence[int] | None = None,
    counts: Sequence[int] = (),
    weights: Sequence[float] = (),
) -> Steps:
    """The steps of a run (see `plan`), whose rows hold documents: side s of item i is number i·S + s.

    Without packing, a micro-batch has `batch_size` items and S times as many rows: all first documents, then all second
    ones, and so on. With packing it has `batch_size` rows of up to S·`seq_len` tokens, each with several whole items.

    Args:
        share: the documents of an item are in one row of up to S·`seq_len` tokens, after one copy of their common start
            (see `common_start`).
        prompts: with `share`, a number for each item; consecutive items with the same number share one copy too, as
            many as a row has room for. Without packing a row holds one such group, and `batch_size` counts rows.
        counts, weights: of a mixture's sources, see `plan`; without `prompts`.

    Raises:
        UserError: see `plan`; or the items differ in their number of documents or in the names of their values.
    """
    items = flat(items)
    sides, units = items.sides, None
    if share and prompts is not None:
        units, lengths = _units(items, prompts, seq_len * sides)
    elif share or packing:
        lengths = items.lengths.sum(axis=1) - (sides - 1) * items.shared * share
    else:
        lengths = items.lengths.max(axis=1)
    whole = share or packing
    planned = plan(
        lengths,
        seq_len=seq_len * sides if whole else seq_len,
        batch_size=batch_size * grad_accum,
        packing=packing,
        bucket=bucket,
        seed=seed,
        epochs=epochs,
        steps=steps,
        shuffle=shuffle,
        counts=counts,
        weights=weights,
    )
    blocks = [(0, sides)] if whole else [(side, side + 1) for side in range(sides)]

    def shaped(step: Step) -> Step:
        rows = [row if units is None else [item for unit in row for item in units[unit]] for row in step.rows]
        groups = [[1 if units is None else len(units[unit]) for unit in row] for row in step.rows]
        return Step(
            tuple(
                tuple(item * sides + side for item in row for side in range(*block))
                for start in range(0, len(rows), batch_size)
                for block in blocks
                for row in rows[start : start + batch_size]
            ),
            step.length,
            tuple(tuple(sides * size for size in row) for row in groups) if share else None,
        )

    return planned.shaped(shaped)


def _units(items: Items, prompts: Sequence[int], room: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The numbers of the items whose documents share one copy of their start, and the total tokens, of each group."""
    units: list[tuple[int, ...]] = []
    lengths: list[int] = []
    for number, item in enumerate(items):
        if units and prompts[number] == prompts[number - 1]:
            members = (*units[-1], number)
            length = _shared_length([document for member in members for document in items[member].documents])
            if length <= room:
                units[-1], lengths[-1] = members, length
                continue
        units.append((number,))
        lengths.append(_shared_length(item.documents))
    return units, np.array(lengths, np.int64)


def _shared_length(documents: Sequence[Example]) -> int:
    return sum(len(document.tokens) for document in documents) - (len(documents) - 1) * common_start(documents)


def loader(
    items: Sequence[Item], steps: Sequence[Step], grad_accum: int = 1, *, by_item: bool = True
) -> grain.DatasetIterator:
    """A grain iterator over the steps' batches; `get_state()` and `set_state(state)` resume it exactly.

    Args:
        by_item: batches are what `collate_items` returns. False, for losses that know only tokens: they are what
            `collate` returns.

    Raises:
        UserError: the rows of a step cannot be split into `grad_accum` micro-batches; or see `plan_items`.
    """
    some = steps[:1] if isinstance(steps, Steps) else steps  # those of a plan have equally many rows
    if uneven := sorted({len(step.rows) for step in some if len(step.rows) % grad_accum}):
        raise UserError(f"found steps of {uneven} rows, expected a multiple of grad_accum={grad_accum}")
    items = flat(items)

    def batch(step: Step) -> Batch:
        return collate_items(items, step, grad_accum) if by_item else collate(items.examples, step, grad_accum)

    dataset = grain.MapDataset.source(steps).map(batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def collate_items(items: Sequence[Item], step: Step, grad_accum: int = 1) -> Batch:
    """The arrays of one step of `plan_items`: those of `collate` [A, B, T], and these for N places of items.

    documents     i32 [A, B, T]  s·N + n in the tokens of document s of item n, S·N in padding and in shared tokens
    items         f32 [A, N]     1 where there is an item, else 0
    (each value)  f32 [A, N]     the items' values by name, 0 where there is no item

    N is the number of items that a micro-batch can hold; if rows hold several items, it is the number of items in the
    step's fullest micro-batch, rounded up to a power of two.

    Raises:
        UserError: the step was not planned for this `grad_accum`.
    """
    items = flat(items)
    sides = items.sides
    batch, owners = lay_out(items.examples, step, grad_accum)
    count, slots = _slots(step, sides, grad_accum)
    numbers = {name: np.zeros((grad_accum, count), np.float32) for name in ("items", *items.values)}
    of_place = np.full((len(step.rows), 1 + max(map(len, step.rows))), sides * count, np.int32)  # the last: no document
    micro_rows = len(step.rows) // grad_accum
    for row, (indices, row_slots) in enumerate(zip(step.rows, slots, strict=True)):
        for place, (index, slot) in enumerate(zip(indices, row_slots, strict=True)):
            item, side = divmod(index, sides)
            of_place[row, place] = side * count + slot
            number = row // micro_rows, slot
            numbers["items"][number] = 1
            for name, values in items.values.items():
                numbers[name][number] = values[item]
    flat_owners = owners.reshape(len(step.rows), -1)
    documents = np.take_along_axis(of_place, flat_owners % of_place.shape[1], axis=1)
    return batch | {"documents": documents.reshape(owners.shape)} | numbers


def in_order(
    items: Sequence[Item],
    *,
    seq_len: int,
    batch_size: int,
    bucket: int = 64,
    share: bool = True,
    prompts: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every item once, in order and unpacked, in batches of one micro-batch; for the arguments see `plan_items`."""
    items = flat(items)
    settings = dict(seq_len=seq_len, batch_size=batch_size, bucket=bucket, share=share, prompts=prompts)
    for step in plan_items(items, packing=False, epochs=1, shuffle=False, **settings):
        yield collate_items(items, step)


def count_tokens(batch: Batch, sides: int) -> int:
    """The number of tokens in the first `sides` documents of all items.

    A batch that does not know its items counts all documents. Shared tokens count for each document.
    """
    if "documents" not in batch:
        return int(np.sum(batch["segment_ids"] > 0))
    documents = batch["documents"]
    after = np.concatenate([documents[..., 1:], np.full_like(documents[..., :1], -1)], axis=-1)
    last = (documents < sides * batch["items"].shape[1]) & (documents != after)
    return int(np.sum(batch["positions"][last] + 1))


def _slots(step: Step, sides: int, grad_accum: int) -> tuple[int, list[list[int]]]:
    """N, and for each document of each row the place of its item in the micro-batch.

    Places are counted, not looked up by item: where two epochs meet, a micro-batch may hold an item twice.
    """
    size = len(step.rows) // grad_accum
    micro_batches = [step.rows[start : start + size] for start in range(0, len(step.rows), size)]
    row_size = 1 if step.groups is None else sides
    if all(len(row) <= row_size for row in step.rows):  # neither packed nor several items sharing a prompt
        count = size * row_size // sides
        for rows in micro_batches:
            if any(len({index // sides for row in rows[n::count] for index in row}) > 1 for n in range(count)):
                raise UserError(f"found a step that was not planned for grad_accum={grad_accum}")
        return count, [[number % count] * len(row) for rows in micro_batches for number, row in enumerate(rows)]
    slots, fullest = [], 0
    for rows in micro_batches:
        seen = 0
        for row in rows:
            slots.append([(seen + number) // sides for number in range(len(row))])
            seen += len(row)
        fullest = max(fullest, seen // sides)
    return 1 << (fullest - 1).bit_length(), slots
