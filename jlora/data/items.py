"""Items: units that a step must not split, such as the answers of a pair. From records to tokens, plans and batches."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jlora.data.batches import Batch, collate, common_start, lay_out
from jlora.data.chat import EncodeReport, Remark, select
from jlora.data.layouts import Layouts
from jlora.data.packing import Step, plan
from jlora.data.preference import NUMBERS, Kind
from jlora.data.records import Note, OnError, Record, warn
from jlora.data.store import Example, Examples
from jlora.data.template import common_prefix, end_with_eos, require_template, template_variables
from jlora.data.tokens import Encoding, plain_text
from jlora.errors import UserError, describe_faults

RESERVED = ("tokens", "targets", "weights", "positions", "segment_ids", "documents", "items")


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """Documents that belong in one step: (chosen, rejected), or a single one; and the numbers that go with them."""

    documents: tuple[Example, ...]
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Singles(Sequence[Item]):
    """Items of one document each, which exist only while somebody looks at them."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        """An item; of a slice, a list of them."""
        found = self.examples[index]
        return [Item((one,)) for one in found] if isinstance(index, slice) else Item((found,))


def encode_preferences(
    records: Sequence[Record],
    tokenizer: Any,
    kind: Kind = "pairs",
    *,
    seq_len: int,
    overlong: str = "drop",
    on_error: OnError = "raise",
    note: Note = warn,
) -> tuple[list[Item], EncodeReport]:
    """An item for each record that can be learned from, in order, and a report.

    The documents of "pairs" are (chosen, rejected), and the values the record's `NUMBERS`; an item of "unpaired" is one
    document with "label" 1 or 0. The tokens are TRL's for DPO: an answer is trained from where prompt and prompt +
    answer diverge, at the same place in both documents, to its very end. For plain text that is the tokenizer's
    end-of-text token; for messages it is whatever the template writes after the last one.

    Args:
        records: as `read_preferences` returns them for this kind.
        overlong: what happens to a document longer than `seq_len`: "cut" keeps its start, "drop" leaves out its record,
            "error" raises.
        on_error, note: see `encode_all`.

    Raises:
        UserError: see `select`; or there are chats and the tokenizer has no chat template.
    """
    sides, names = (("chosen", "rejected"), NUMBERS) if kind == "pairs" else (("completion",), ("label",))
    require_template(tokenizer, [not isinstance(record["prompt"], str) for record in records])
    layouts = Layouts(tokenizer)
    documents, report = select(
        records,
        lambda record, remark: _encode_sides(record, sides, layouts, remark),
        tokenizer,
        seq_len=seq_len,
        overlong=overlong,
        on_error=on_error,
        note=note,
    )
    items = []
    for place, index in enumerate(report.kept):
        values = {name: float(records[index][name]) for name in names if name in records[index]}
        items.append(Item(tuple(documents[place * len(sides) : (place + 1) * len(sides)]), values))
    return items, report


def with_mismatched(items: Sequence[Item], batch_size: int, *, seq_len: int) -> list[Item]:
    """The items with a second document: the item's prompt with the answer of the item before it.

    This is how TRL's KTO pairs them for its estimate of the KL: within each `batch_size` items in the order given, the
    first getting the last one's answer. An item alone in the last batch gets its own. The document is cut at `seq_len`,
    and an answer that was cut already stays so.

    Raises:
        UserError: `batch_size` is below 2, or an item has more than one document.
    """
    if batch_size < 2:
        raise UserError(f"found batch_size={batch_size}, expected 2 or more, to pair prompts with others' answers")
    if sides := {len(item.documents) for item in items} - {1}:
        raise UserError(f"found items of {sorted(sides)} documents, expected one document each")
    found = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        for item, before in zip(batch, [*batch[-1:], *batch[:-1]], strict=True):
            (own,), (other,) = item.documents, before.documents
            prompt, answer = own.tokens[~own.trained], other.tokens[other.trained]
            tokens = np.concatenate([prompt, answer])[:seq_len]
            mismatched = Example(tokens, np.arange(len(tokens)) >= len(prompt))
            found.append(dataclasses.replace(item, documents=(own, mismatched)))
    return found


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
) -> list[Step]:
    """The steps of a run (see `plan`), whose rows hold documents: side s of item i is number i·S + s.

    Without packing, a micro-batch has `batch_size` items and S times as many rows: all first documents, then all second
    ones, and so on. With packing it has `batch_size` rows of up to S·`seq_len` tokens, each with several whole items.

    Args:
        share: the documents of an item are in one row of up to S·`seq_len` tokens, after one copy of their common start
            (see `common_start`).
        prompts: with `share`, a number for each item; consecutive items with the same number share one copy too, as
            many as a row has room for. Without packing a row holds one such group, and `batch_size` counts rows.

    Raises:
        UserError: see `plan`; or the items differ in their number of documents or in the names of their values.
    """
    sides, _ = _check(items)
    if share:
        units = _units(items, prompts, seq_len * sides)
        lengths = np.array([length for _, length in units], np.int64)
    else:
        units = [((number,), 0) for number in range(len(items))]
        of_documents = lengths_of(documents_of(items)).reshape(len(items), sides)
        lengths = of_documents.sum(axis=1) if packing else of_documents.max(axis=1)
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
    )
    blocks = [(0, sides)] if whole else [(side, side + 1) for side in range(sides)]
    return [
        Step(
            tuple(
                tuple(item * sides + side for unit in row for item in units[unit][0] for side in range(*block))
                for start in range(0, len(step.rows), batch_size)
                for block in blocks
                for row in step.rows[start : start + batch_size]
            ),
            step.length,
            tuple(tuple(sides * len(units[unit][0]) for unit in row) for row in step.rows) if share else None,
        )
        for step in planned
    ]


def _units(items: Sequence[Item], prompts: Sequence[int] | None, room: int) -> list[tuple[tuple[int, ...], int]]:
    """(numbers of the items whose documents share one copy of their start, total tokens) for each group, in order."""
    units: list[tuple[tuple[int, ...], int]] = []
    for number, item in enumerate(items):
        if units and prompts is not None and prompts[number] == prompts[number - 1]:
            members = (*units[-1][0], number)
            length = _shared_length([document for member in members for document in items[member].documents])
            if length <= room:
                units[-1] = members, length
                continue
        units.append(((number,), _shared_length(item.documents)))
    return units


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
    if uneven := sorted({len(step.rows) for step in steps if len(step.rows) % grad_accum}):
        raise UserError(f"found steps of {uneven} rows, expected a multiple of grad_accum={grad_accum}")
    sides, names = _check(items)
    documents = documents_of(items)

    def batch(step: Step) -> Batch:
        if not by_item:
            return collate(documents, step, grad_accum)
        return _collate(documents, items, sides, names, step, grad_accum)

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
    sides, names = _check(items)
    return _collate(documents_of(items), items, sides, names, step, grad_accum)


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


def _collate(
    documents: Sequence[Example], items: Sequence[Item], sides: int, names: Sequence[str], step: Step, grad_accum: int
) -> Batch:
    batch, owners = lay_out(documents, step, grad_accum)
    count, slots = _slots(step, sides, grad_accum)
    numbers = {name: np.zeros((grad_accum, count), np.float32) for name in ("items", *names)}
    of_place = np.full((len(step.rows), 1 + max(map(len, step.rows))), sides * count, np.int32)  # the last: no document
    micro_rows = len(step.rows) // grad_accum
    for row, (indices, row_slots) in enumerate(zip(step.rows, slots, strict=True)):
        for place, (index, slot) in enumerate(zip(indices, row_slots, strict=True)):
            item, side = divmod(index, sides)
            of_place[row, place] = side * count + slot
            number = row // micro_rows, slot
            numbers["items"][number] = 1
            for name in names:
                numbers[name][number] = items[item].values[name]
    flat = owners.reshape(len(step.rows), -1)
    batch["documents"] = np.take_along_axis(of_place, flat % of_place.shape[1], axis=1).reshape(owners.shape)
    return batch | numbers


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


def _encode_sides(record: Record, sides: tuple[str, ...], layouts: Layouts, remark: Remark) -> Encoding:
    """The record's documents."""
    prompt, answers = record["prompt"], [record[side] for side in sides]
    if isinstance(prompt, str):
        before, *found = yield [
            plain_text(text, layouts.tokenizer) for text in (prompt, *(prompt + one for one in answers))
        ]
        whole = [end_with_eos(one.ids, layouts.tokenizer) for one in found]
        starts = [common_prefix(before.ids, tokens) for tokens in whole]
        held = [np.zeros(len(tokens), np.bool_) for tokens in whole]
    else:
        found = []
        for answer in answers:
            found.append((yield from _encode_answer(record, prompt, answer, layouts, remark)))
        whole, starts, held = zip(*found, strict=True)
    if len(whole) > 1 and all(np.array_equal(whole[0], tokens) for tokens in whole[1:]):
        raise UserError(f"found the same tokens for {' and '.join(sides)}, expected different answers")
    return tuple(
        Example(tokens, (np.arange(len(tokens)) >= min(starts)) & ~untrained)
        for tokens, untrained in zip(whole, held, strict=True)
    )


def _encode_answer(record: Record, prompt: list, answer: list, layouts: Layouts, remark: Remark) -> Encoding:
    """The tokens of a prompt with its answer, where the answer starts, and which tokens are in untrained turns."""
    chat, first = prompt + answer, len(prompt)
    answers = [index for index in range(first, len(chat)) if chat[index]["role"] == "assistant"]
    untrained = [index for index in answers if chat[index].get("train") is False]
    learned = [index for index in answers if index not in untrained]
    turns = yield from layouts.turns(chat, template_variables(record), trained=learned, remark=remark)
    held = np.zeros(len(turns.tokens), np.bool_)
    for index in untrained:
        held[turns.places(index)] = True
    if not learned:  # what the template writes after the turns is not trained either
        held[:] = True
    return turns.tokens, turns.start(first), held


def documents_of(items: Sequence[Item]) -> Sequence[Example]:
    """The documents of the items, those of an item one after another."""
    if isinstance(items, Singles):
        return items.examples
    return [document for item in items for document in item.documents]


def lengths_of(documents: Sequence[Example]) -> np.ndarray:
    """The number of tokens of each document, int64."""
    if isinstance(documents, Examples):
        return documents.lengths
    return np.array([len(document.tokens) for document in documents], np.int64)


def _check(items: Sequence[Item]) -> tuple[int, tuple[str, ...]]:
    """(number of documents of an item, names of its values); raises UserError unless all items agree on both."""
    if not items:
        raise UserError("found no items, expected at least one")
    if isinstance(items, Singles):
        return 1, ()
    sides, names = len(items[0].documents), tuple(sorted(items[0].values))
    faults = [
        f"item {number}: found {len(item.documents)} documents and the values {sorted(item.values)}, expected {sides} "
        f"and {list(names)}, as in the first item"
        for number, item in enumerate(items)
        if len(item.documents) != sides or set(item.values) != set(names)
    ]
    if taken := sorted(set(names) & set(RESERVED)):
        faults.append(f"found values called {taken}, expected names other than {', '.join(RESERVED)}")
    if faults:
        raise UserError(describe_faults("the items do not go together", faults))
    return sides, names
