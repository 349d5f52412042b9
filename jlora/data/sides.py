"""From preference records to tokens: an item for each, with the documents of its sides."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jlora.data.chat import Arrange, EncodeReport, Progress, Remark, select, with_template
from jlora.data.layouts import Layouts
from jlora.data.notes import Note, warn
from jlora.data.preference import NUMBERS, Kind
from jlora.data.records import OnError, Record
from jlora.data.store import Example, Item, Items
from jlora.data.template import common_prefix, end_with_eos, template_variables
from jlora.data.tokens import Encoding, plain_text
from jlora.data.writer import Writer
from jlora.errors import UserError


def encode_preferences(
    records: Iterable[Record],
    tokenizer: Any,
    kind: Kind = "pairs",
    *,
    seq_len: int,
    overlong: str = "drop",
    on_error: OnError = "raise",
    note: Note = warn,
    writer: Writer | None = None,
    progress: Progress | None = None,
    arrange: Arrange = iter,
    keep: bool = False,
    divide: bool = False,
) -> tuple[Items, EncodeReport]:
    """An item for each record that can be learned from, in order, and a report.

    The documents of "pairs" are (chosen, rejected), and the values the record's `NUMBERS`; an item of "unpaired" is one
    document with "label" 1 or 0. The tokens are TRL's for DPO: an answer is trained from where prompt and prompt +
    answer diverge, at the same place in both documents, to its very end. For plain text that is the tokenizer's
    end-of-text token; for messages it is whatever the template writes after the last one.

    Args:
        records: as `read_preferences` returns them for this kind; they are read once, and forgotten when they are
            encoded, if the tokenizer has a chat template.
        overlong: what happens to a document longer than `seq_len`: "cut" keeps its start, "drop" leaves out its record,
            "error" raises.
        on_error, note: see `encode_all`.
        writer, progress: see `encode`.
        arrange, keep, divide: see `select`.

    Raises:
        UserError: see `select`; or there are chats and the tokenizer has no chat template.
    """
    sides, names = (("chosen", "rejected"), NUMBERS) if kind == "pairs" else (("completion",), ("label",))
    layouts = Layouts(tokenizer)

    def one(record: Record, remark: Remark) -> Encoding:
        documents = yield from _encode_sides(record, sides, layouts, remark)
        return [Item(documents, {name: float(record[name]) for name in names if name in record})]

    settings = dict(seq_len=seq_len, overlong=overlong, on_error=on_error, note=note, progress=progress)
    records = with_template(records, tokenizer, lambda record: isinstance(record["prompt"], str))
    return select(records, one, tokenizer, writer=writer, arrange=arrange, keep=keep, divide=divide, **settings)


def with_mismatched(items: Iterable[Item], batch_size: int, *, seq_len: int) -> Iterator[Item]:
    """The items with a second document: the item's prompt with the answer of the item before it.

    This is how TRL's KTO pairs them for its estimate of the KL: within each `batch_size` items in the order given, the
    first getting the last one's answer. An item alone in the last batch gets its own. The document is cut at `seq_len`,
    and an answer that was cut already stays so.

    Raises:
        UserError: `batch_size` is below 2, or an item has more than one document.
    """
    if batch_size < 2:
        raise UserError(f"found batch_size={batch_size}, expected 2 or more, to pair prompts with others' answers")
    items = iter(items)
    return itertools.chain.from_iterable(
        _mismatched(batch, seq_len) for batch in iter(lambda: list(itertools.islice(items, batch_size)), [])
    )


def _mismatched(batch: Sequence[Item], seq_len: int) -> Iterator[Item]:
    if sides := {len(item.documents) for item in batch} - {1}:
        raise UserError(f"found items of {sorted(sides)} documents, expected one document each")
    for item, before in zip(batch, [*batch[-1:], *batch[:-1]], strict=True):
        (own,), (other,) = item.documents, before.documents
        prompt, answer = own.tokens[~own.trained], other.tokens[other.trained]
        tokens = np.concatenate([prompt, answer])[:seq_len]
        mismatched = Example(tokens, np.arange(len(tokens)) >= len(prompt))
        yield dataclasses.replace(item, documents=(own, mismatched))


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
