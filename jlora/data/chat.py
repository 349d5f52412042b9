"""From records to tokens: the tokenizer's own chat template, and which tokens the loss counts."""

import array
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jlora.data.hosts import divided
from jlora.data.layouts import Layouts
from jlora.data.notes import Note, as_notes, warn
from jlora.data.records import Counted, OnError, Placed, Record, place_of, settle_faults, source_of
from jlora.data.rendered import Written, write
from jlora.data.store import Example, Examples, Item, Items
from jlora.data.template import (
    as_messages,
    common_prefix,
    end_with_eos,
    require_template,
    template_ending,
    template_variables,
)
from jlora.data.tokens import Encoding, Text, encode_together, plain_text, tokenize
from jlora.data.turns import Turns
from jlora.data.writer import Writer
from jlora.errors import UserError, first_few, number_of

Remark = Callable[[str], None]
Progress = Callable[[int], None]
Arrange = Callable[[Iterator[Item]], Iterable[Item]]
STOP_IN_WORDS = "the token that ends answers occurs inside an answer, where the model would learn to stop"
# Marks in templates of what the model writes, for transformers' return_assistant_tokens_mask.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclasses.dataclass(frozen=True)
class EncodeReport:
    """What became of the records: counts of what was kept, cut and left out.

    Attributes:
        examples, tokens, trained_tokens: counts of what is kept (in preference data an example is an `Item`).
        kept: index of each example's record.
        cut: examples kept without their end.
        dropped: records left out because they are too long.
        untrained: records left out because they would teach nothing after cutting: one of their documents has no
            trained token, or all their documents are equal.
        sources: how many examples come from each source, in order.
        notes: remarks on some records, each kind once, with how many records it concerns and the first of them.
        columns: of prompts: the names of all fields that any record has besides its prompt.
    """

    examples: int
    tokens: int
    trained_tokens: int
    kept: Sequence[int]
    cut: int
    dropped: int
    untrained: int
    notes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()


def encode(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    seq_len: int,
    overlong: str = "drop",
    completion_only: bool | Sequence[bool] = True,
    window_overlap: int | None = 1,
    end: bool = True,
    on_error: OnError = "raise",
    note: Note = warn,
    progress: Progress | None = None,
) -> tuple[Examples, EncodeReport]:
    """The documents of `encode_items`, which says what the arguments are, and the report."""
    settings = dict(overlong=overlong, completion_only=completion_only, window_overlap=window_overlap, end=end)
    settings |= dict(on_error=on_error, note=note, progress=progress)
    items, report = encode_items(records, tokenizer, seq_len=seq_len, **settings)
    return items.examples, report


def encode_items(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    seq_len: int,
    overlong: str = "drop",
    completion_only: bool | Sequence[bool] = True,
    window_overlap: int | None = 1,
    end: bool = True,
    on_error: OnError = "raise",
    note: Note = warn,
    writer: Writer | None = None,
    progress: Progress | None = None,
    keep: bool = False,
    divide: bool = False,
) -> tuple[Items, EncodeReport]:
    """Items of one document for the records that can be trained on, in order, and a report of what was left out.

    The loss counts every assistant turn of `messages`, or the completion of a prompt, each with the token that ends
    it, so that the model learns to stop. Tokens after the last counted one are dropped. Turns with "train": false are
    never counted. If a chat template has `{% generation %}` marks, they decide what is counted of a turn. A text (a
    completion of an empty prompt) that is longer than `seq_len` becomes several items.

    Args:
        records: they are read once, and forgotten when they are encoded, if the tokenizer has a chat template.
        seq_len: the most tokens of an example.
        overlong: "drop", "cut" or "error": see `DataConfig`.
        completion_only: if False, prompts are counted too; one for all records, or one for each source.
        window_overlap: tokens that each window of a long text repeats from the end of the one before it. They are read
            and not counted; 1: each token of the text is counted once. None: texts are like other records.
        end: whether an end-of-text token is added; what a chat template writes after a turn counts either way.
        on_error, note: see `encode_all`.
        writer: takes the items; by default they are in memory.
        progress: called with the number of records encoded, again and again.
        keep, divide: see `select`.

    Raises:
        UserError: see `select`; or there are chats and the tokenizer has no chat template.
    """
    records, layouts = with_template(records, tokenizer), Layouts(tokenizer)

    def one(record: Record, remark: Remark) -> Encoding:
        tokens, trained, held = yield from _encode_record(record, layouts, end, remark)
        length = int(np.flatnonzero(trained)[-1]) + 1 if trained.any() else 0
        only = completion_only if isinstance(completion_only, bool) else completion_only[source_of(record)]
        example = Example(tokens[:length], (trained if only else trained | ~held)[:length])
        if window_overlap is None or not _is_text(record) or record["prompt"]:
            return [Item((example,))]
        return [Item((window,)) for window in windows(example, seq_len, window_overlap)]

    settings = dict(seq_len=seq_len, overlong=overlong, on_error=on_error, note=note, progress=progress)
    return select(records, one, tokenizer, writer=writer, keep=keep, divide=divide, **settings)


def windows(example: Example, size: int, overlap: int) -> Iterator[Example]:
    """The example in windows of at most `size` tokens.

    Each begins with the last `overlap` tokens of the one before it, which it does not train again.
    """
    for start in range(0, max(1, len(example.tokens) - overlap), size - overlap):
        tokens, trained = (array[start : start + size] for array in (example.tokens, example.trained))
        yield Example(tokens, trained & (np.arange(len(tokens)) >= overlap) if start else trained)


def select(
    records: Iterable[Record],
    encode_record: Callable[[Record, Remark], Encoding],
    tokenizer: Any,
    *,
    seq_len: int,
    overlong: str,
    on_error: OnError = "raise",
    note: Note = warn,
    writer: Writer | None = None,
    progress: Progress | None = None,
    arrange: Arrange = iter,
    keep: bool = False,
    divide: bool = False,
) -> tuple[Items, EncodeReport]:
    """The items of the records that can be trained on, no document of which is longer than `seq_len`, and a report.

    An item is kept or left out as a whole.

    Args:
        encode_record: (record, function to call with a remark on it) → the generator of its items, mostly one.
        arrange: (the items of the records) → the items to train on, as many; the report knows only the former.
        keep: each item is kept with its record.
        divide: see `encode_all`.

    Raises:
        ValueError: a record cannot be encoded, a record is too long and `overlong` is "error", or nothing remains.
    """

    def one(record: Record) -> Encoding:
        said: dict[str, None] = {}
        items = yield from encode_record(record, said.setdefault)
        if overlong == "error" and (longest := max(map(_longest, items))) > seq_len:
            raise UserError(f"found {longest} tokens, expected at most {seq_len}")
        place = record.place if isinstance(record, Placed) else None
        return [dataclasses.replace(item, record=dict(record)) for item in items] if keep else items, said, place

    writer, counted = writer or Writer(), Counted(records)
    tally = _Tally(seq_len, overlong, as_notes(note).leave_out)

    def kept() -> Iterator[Item]:
        settings = dict(on_error=on_error, note=note, divide=divide)
        for index, (items, said, place) in encode_all(counted, one, tokenizer, **settings):
            if progress:
                progress(index + 1)
            for item in items:
                if found := tally.see(index, place or f"record {index + 1}", item, said):
                    yield found

    for item in arrange(kept()):
        writer.add(item)
    if not tally.places:
        room = number_of(seq_len, "token")
        raise UserError(
            f"no token to train on in {number_of(counted.count, 'record')}: {tally.dropped} longer than {room} and "
            f"dropped, {tally.untrained} without a completion token within {room}; raise train.seq_len"
        )
    items = writer.finish()
    kept_records = tally.places if writer.folder else tuple(tally.places)
    return items, tally.report(kept_records, counted.by_source(tally.places))


class _Tally:
    """Counts what is kept, cut and left out."""

    def __init__(self, seq_len: int, overlong: str, leave_out: Callable[[str, str], None]) -> None:
        self._seq_len, self._overlong, self._leave_out = seq_len, overlong, leave_out
        self.places = array.array("q")
        self.dropped = self.untrained = self._cut = self._tokens = self._trained_tokens = 0
        self._remarks: dict[str, list[int]] = {}

    def see(self, index: int, place: str, item: Item, said: Iterable[str]) -> Item | None:
        """What is kept of a record's item, with remarks on it: all of it, its documents' starts, or nothing."""
        length = self._seq_len
        if too_long := (longest := _longest(item)) > length:
            if self._overlong == "drop":
                self.dropped += 1
                self._leave_out(place, f"longer than train.seq_len: {longest} tokens")
                return None
            documents = tuple(Example(one.tokens[:length], one.trained[:length]) for one in item.documents)
            item = dataclasses.replace(item, documents=documents)
        # Nothing predicts the first token.
        if not all(one.trained[1:].any() for one in item.documents) or _alike(item.documents):
            self.untrained += 1
            self._leave_out(place, f"no trained token within {length} tokens")
            return None
        self._cut += too_long
        for remark in said:
            self._remarks.setdefault(remark, []).append(index + 1)
        for one in item.documents:
            self._tokens += len(one.tokens)
            self._trained_tokens += int(one.trained[1:].sum())
        self.places.append(index)
        return item

    def report(self, kept: Sequence[int], sources: tuple[int, ...]) -> EncodeReport:
        return EncodeReport(
            examples=len(self.places),
            tokens=self._tokens,
            trained_tokens=self._trained_tokens,
            kept=kept,
            cut=self._cut,
            dropped=self.dropped,
            untrained=self.untrained,
            notes=tuple(_describe_remark(remark, numbers) for remark, numbers in self._remarks.items()),
            sources=sources,
        )


def _longest(item: Item) -> int:
    return max(len(document.tokens) for document in item.documents)


def encode_all(
    records: Iterable[Record],
    encode_record: Callable[[Record], Encoding],
    tokenizer: Any,
    *,
    noun: str = "record",
    on_error: OnError = "raise",
    note: Note = warn,
    divide: bool = False,
) -> Iterator[tuple[int, Any]]:
    """(index, what `encode_record` makes of it) for each record, in order; what is wrong is told at the end.

    Args:
        encode_record: record → the generator that encodes it, see `jlora.data.tokens`.
        on_error: "raise", or "skip" to leave out records that cannot be encoded.
        note: called with a message about the records that are left out.
        divide: each process encodes its share, and all get everything: call it on all, with the same records.

    Raises:
        UserError: records cannot be encoded; all are named, each kind of fault once.
    """

    def encoded(some: Iterable[tuple[int, Record]]) -> Iterator[tuple[int, str, Any]]:
        for (index, record), found in encode_together(some, lambda one: encode_record(one[1]), tokenizer):
            yield index, place_of(record, index), found

    faults, count = [], 0
    for index, place, found in divided(enumerate(records), encoded) if divide else encoded(enumerate(records)):
        count += 1
        if isinstance(found, UserError):
            faults.append((place, str(found)))
        else:
            yield index, found
    title = f"{len(faults)} of {number_of(count, noun)} cannot be encoded"
    settle_faults(title, faults, count - len(faults), on_error, note)


def encodable(
    records: Sequence[Record], tokenizer: Any, *, on_error: OnError = "raise", note: Note = warn
) -> list[Record]:
    """The records that can be encoded, whatever their length; others raise or are noted, as in `encode_all`."""
    records, layouts = with_template(records, tokenizer), Layouts(tokenizer)
    found = encode_all(
        records,
        lambda record: _encode_record(record, layouts, True, str),
        tokenizer,
        on_error=on_error,
        note=note,
    )
    return [records[index] for index, _ in found]


def split_prompt(record: Record) -> tuple[str | list[dict[str, Any]], str]:
    """The prompt to generate from, and the text of the record's answer.

    With messages, the answer is the last assistant message and the prompt is everything before it. If the answer calls
    tools, the text is only what it says beside the calls; see `answer_text`.
    """
    if _is_text(record):
        return record["prompt"], record["completion"]
    messages, _ = _conversation(record)
    last = _last_answer(messages)
    return messages[:last], messages[last].get("content") or ""


def answer_text(record: Record, tokenizer: Any) -> str:
    """The text of the record's answer, as a model that gives this answer would write it.

    If the answer calls tools, that is the whole turn as the template writes it, calls included, without special tokens
    and reasoning, as `generate` returns an answer.

    Raises:
        UserError: the template cannot write the answer.
    """
    _, text = split_prompt(record)
    if _is_text(record):
        return text
    messages, _ = _conversation(record)
    last = _last_answer(messages)
    if not messages[last].get("tool_calls"):
        return text
    written = write(messages[: last + 1], tokenizer, template_variables(record))
    [tokens] = tokenize([Text(written.text)], tokenizer)
    turns = Turns(written, tokens, template_ending(tokenizer))
    found = tokenizer.decode(turns.tokens[turns.places(last)], skip_special_tokens=True)
    return found.rpartition("</think>")[2].lstrip("\n") if "</think>" in found else found


def _last_answer(messages: list[dict[str, Any]]) -> int:
    return max(index for index, message in enumerate(messages) if message["role"] == "assistant")


def _is_text(record: Record) -> bool:
    return "messages" not in record and isinstance(record["prompt"], str) and isinstance(record["completion"], str)


def with_template(
    records: Iterable[Record], tokenizer: Any, is_text: Callable[[Record], bool] | None = None
) -> Iterable[Record]:
    """The records; without a template all are read first, to say how many are chats."""
    if not tokenizer.chat_template:
        records = list(records)
        require_template(tokenizer, [not (is_text or _is_text)(record) for record in records])
    return records


def _conversation(record: Record) -> tuple[list[dict[str, Any]], int]:
    """All messages, and the index of the first one that may be trained."""
    if "messages" in record:
        return record["messages"], 0
    prompt = as_messages(record["prompt"], "user")
    return prompt + as_messages(record["completion"], "assistant"), len(prompt)


def _encode_record(record: Record, layouts: Layouts, end: bool, remark: Remark) -> Encoding:
    """The tokens, which of them are trained, and which belong to turns marked "train": false."""
    tokenizer = layouts.tokenizer
    if _is_text(record):
        tokens, trained = yield from _encode_text(record["prompt"], record["completion"], tokenizer, end)
        return tokens, trained, np.zeros_like(trained)
    ending = layouts.ending
    messages, first = _conversation(record)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [index for index in answers if index >= first and messages[index].get("train") is not False]
    turns = yield from layouts.turns(messages, template_variables(record), trained=learned, remark=remark)
    places = {index: turns.places(index) for index in answers}
    tokens = turns.tokens
    if end and not ending and messages[-1]["role"] == "assistant":
        tokens = end_with_eos(tokens, tokenizer)
        last = places[len(messages) - 1]
        places[len(messages) - 1] = np.union1d(last, np.arange(len(turns.tokens), len(tokens)))
    places = _widen(places, _generation_mask(turns.written, tokens))
    trained, held = np.zeros(len(tokens), np.bool_), np.zeros(len(tokens), np.bool_)
    for index, of_turn in places.items():
        if index in learned:
            _check_turn(index, tokens[of_turn], ending, remark)
            trained[of_turn] = True
        elif messages[index].get("train") is False:
            held[of_turn] = True
    return tokens, trained, held


def _encode_text(prompt: str, completion: str, tokenizer: Any, end: bool) -> Encoding:
    before, whole = yield [plain_text(prompt, tokenizer), plain_text(prompt + completion, tokenizer)]
    tokens = end_with_eos(whole.ids, tokenizer) if end else whole.ids
    return tokens, np.arange(len(tokens)) >= common_prefix(before.ids, tokens)


def _generation_mask(written: Written, tokens: np.ndarray) -> np.ndarray | None:
    """Which tokens the model writes, according to the template's own marks; None if it has none."""
    tokenizer = written.tokenizer
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = tokenizer.get_chat_template(None, written.variables.get("tools"))
    if not _is_marked(template) or not getattr(tokenizer, "is_fast", False):
        return None
    found = tokenizer.apply_chat_template(
        written.messages, return_dict=True, return_assistant_tokens_mask=True, **written.variables
    )
    mask = np.zeros(len(tokens), np.bool_)
    mask[: len(found["assistant_masks"])] = found["assistant_masks"]
    mask[len(found["assistant_masks"]) :] = True  # an end-of-text token that the template does not write
    return mask if mask.any() else None


@functools.lru_cache(maxsize=8)
def _is_marked(template: str) -> bool:
    """Whether a template marks what the model writes."""
    return _GENERATION.search(template) is not None


def _widen(places: dict[int, np.ndarray], mask: np.ndarray | None) -> dict[int, np.ndarray]:
    """The places of each turn's tokens; with a mask, the masked places in each turn and adjacent to it."""
    if mask is None:
        return places
    found = {}
    indices = [index for index in places if len(places[index])]
    for number, index in enumerate(indices):
        start, end = int(places[index][0]), int(places[index][-1]) + 1
        before = int(places[indices[number - 1]][-1]) + 1 if number else 0
        after = int(places[indices[number + 1]][0]) if number + 1 < len(indices) else len(mask)
        while start > before and mask[start - 1]:
            start -= 1
        while end < after and mask[end]:
            end += 1
        found[index] = start + np.flatnonzero(mask[start:end])
    return found


def _check_turn(index: int, tokens: np.ndarray, ending: tuple[int, ...], remark: Remark) -> None:
    """Raises UserError if nothing but its end is left of a turn; remarks on a turn with a stop token inside."""
    if tuple(tokens) == ending[: len(tokens)]:
        raise UserError(f"messages[{index}]: the chat template writes none of its text, expected text to learn")
    if ending and (tokens == ending[0]).sum() > 1:
        remark(STOP_IN_WORDS)


def _describe_remark(remark: str, numbers: list[int]) -> str:
    return f"{len(numbers)} record{'s' * (len(numbers) > 1)} ({first_few(numbers)}): {remark}"


def _alike(documents: tuple[Example, ...]) -> bool:
    first, *others = (document.tokens for document in documents)
    return bool(others) and all(np.array_equal(first, other) for other in others)
