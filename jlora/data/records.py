"""Reading the records of files, and reporting what was found and expected in every invalid row."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jlora.data.forms import (
    Record,
    answer,
    as_chat,
    asks,
    media_faults,
    normal_row,
    question_keys,
    unused_keys,
    unused_template_fields,
    with_system,
)
from jlora.data.found import Form, Seen, chat_form, question_form, shown_row
from jlora.data.messages import completion_faults, kind_of, message_faults, side_faults
from jlora.data.notes import Note, Notes, as_notes, warn
from jlora.data.paths import Where
from jlora.data.sources import Sources, as_sources
from jlora.errors import Grouped, UserError, describe_faults, group_faults, number_of
from jlora.names import OnError

_FORMS = (
    'an object with "messages" (or "conversations"), with "prompt" and "completion", with a question and an answer '
    '("instruction", "input" and "output"), or with "text"'
)


class Placed(dict):
    """A record that knows its place, such as "train.jsonl:7", for messages about it, and the number of its source."""

    __slots__ = ("place", "source")

    def __init__(self, record: Record, place: str, source: int = 0) -> None:
        super().__init__(record)
        self.place, self.source = place, source

    def __reduce__(self) -> tuple:
        return Placed, (dict(self), self.place, self.source)


def place_of(record: Record, index: int) -> str:
    """A record's place; for one that is not from a file, its number."""
    return record.place if isinstance(record, Placed) else f"record {index + 1}"


def source_of(record: Record) -> int:
    """The number of a record's source among its run's; 0 for one that is not from a file."""
    return record.source if isinstance(record, Placed) else 0


@dataclasses.dataclass(frozen=True)
class Accepted:
    """What becomes of a row.

    Attributes:
        records: what it holds.
        faults: what is wrong with it.
        unused: notes on keys that another loader would have used.
        form: the form that it was read in, if it has one.
    """

    records: list[Record]
    faults: list[str]
    unused: Sequence[str] = ()
    form: Form | None = None


Accept = Callable[[Any], Accepted]


class Counted(Iterable[Record]):
    """Records that are counted while they are read, together and by source.

    Attributes:
        count: how many were read.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._records, self.count = records, 0
        self._starts: list[int] = []  # the number of each source's first record

    def __iter__(self) -> Iterator[Record]:
        for record in self._records:
            while len(self._starts) <= source_of(record):
                self._starts.append(self.count)
            self.count += 1
            yield record

    def by_source(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """How many of some records, given by their numbers in order, come from each source."""
        edges = np.searchsorted(np.asarray(numbers), [*self._starts, np.iinfo(np.int64).max])
        return tuple(np.diff(edges).tolist())


def read_records(where: Where | Sources, *, on_error: OnError = "raise", note: Note = warn) -> list[Record]:
    """The records of files (see `read_rows`), in order, with all their keys.

    A record is `{"messages": [{"role": ..., "content": ...}, ...]}` with at least one assistant message, or
    `{"prompt": ..., "completion": ...}` where both are text or lists of messages. With "messages" present, "prompt" is
    just another key that is kept. "tools" (a list) and "chat_template_kwargs" (an object) go to the chat template.

    Rows of Alpaca (an instruction with its input, or a question, and the output) and of ShareGPT ("conversations") get
    "messages"; a "system" beside them becomes the first of these. A row of "text" alone becomes the completion of an
    empty prompt. A turn that is marked as not trained, in whatever spelling, has "train": False.

    Raises:
        UserError: see `read_rows`.
    """
    return read_rows(where, _accept, _FORMS, on_error=on_error, note=note)


def iterate_records(where: Where | Sources, *, on_error: OnError = "raise", note: Note = warn) -> Iterator[Record]:
    """The records of `read_records`, one after another; see `iterate_rows`."""
    return iterate_rows(where, _accept, _FORMS, on_error=on_error, note=note)


def read_rows(
    where: Where | Sources,
    accept: Accept,
    forms: str,
    *,
    on_error: OnError = "raise",
    note: Note = warn,
    rest: str = "not used",
) -> list[Record]:
    """The records that `accept` makes of the rows of a path (see `jlora.data.paths.locate`) or of sources, in order.

    Files are JSONL, a JSON array, CSV, text, .parquet or .arrow; all but the last two may be packed. Tables other than
    CSV need the extra "datasets".

    Args:
        accept: row → its records and faults.
        forms: what a row should be, for error messages.
        on_error: "raise", or "skip" to leave out invalid rows and note them.
        note: called with messages on rows that are left out, and on keys that are not used; `Notes` are also told which
            form the rows have.
        rest: what becomes of keys that no form reads.

    Raises:
        UserError: a file does not exist or is of another kind; a row is invalid (all are named as path:number, each
            kind of fault once); there are no rows, or no valid ones, in one of the sources.
    """
    return list(iterate_rows(where, accept, forms, on_error=on_error, note=note, rest=rest))


def iterate_rows(
    where: Where | Sources,
    accept: Accept,
    forms: str,
    *,
    on_error: OnError = "raise",
    note: Note = warn,
    rest: str = "not used",
) -> Iterator[Record]:
    """The records of `read_rows`, one after another.

    What is wrong with the rows is raised or noted at the end. If it will be raised, no record comes after the first
    invalid row.
    """
    sources, tally = as_sources(where), _Tally(on_error)
    notes = as_notes(note)
    # What is wrong with the rows of both sides was told when the first side was read.
    tells = Notes(lambda message: None, notes.tell) if sources.held_out and sources.share else notes
    sources.reading.begin(sources.parts())
    for number, (name, source) in enumerate(sources.sources.items()):
        seen, kept, given = Seen(rest), 0, 0
        label = f"{name} ({source})" if name else str(source)
        for place, row in source.rows(sources.reading):
            found = Accepted([], [str(row)]) if isinstance(row, UserError) else accept(row)
            tally.add(place, row, found)
            if found.faults:
                continue
            seen.add(found.form, row, place)
            for record in found.records:
                if given == source.limit:
                    break
                given += 1
                if sources.takes(record):
                    kept += 1
                    if not tally.stops:
                        yield Placed(record, place, number)
            if given == source.limit:
                break
        if not kept and not tally.faults:
            raise UserError(_nothing(label, given, sources, forms))
        if kept and not tally.stops:
            notes.tell(seen.describe(f"{label}, held out" if sources.held_out else label, kept))
    tally.settle(str(sources), tells)


class _Tally:
    """The faults of rows, and what was not used of the others."""

    def __init__(self, on_error: OnError) -> None:
        self.on_error, self.count, self.wrong, self.right = on_error, 0, 0, 0
        self.faults: list[tuple[str, str]] = []
        self._unused = Grouped()
        self._first: Any = None

    @property
    def stops(self) -> bool:
        """Whether a fault was found that will be raised."""
        return bool(self.faults) and self.on_error == "raise"

    def add(self, place: str, row: Any, found: Accepted) -> None:
        self._first = row if self._first is None else self._first
        self.count += 1
        self.wrong += bool(found.faults)
        self.faults += [(place, fault) for fault in found.faults]
        if not found.faults:
            self.right += len(found.records)
            for one in found.unused:
                self._unused.add(place, one)

    def settle(self, name: str, note: Note) -> None:
        title = f"{name}: {self.wrong} of {number_of(self.count, 'record')} cannot be used"
        formless = not self.right and all(fault.startswith("found the fields") for _, fault in self.faults)
        if formless and isinstance(self._first, dict) and self._first:
            title += f"; the first is {shown_row(self._first)} (data.columns says which columns to read)"
        settle_faults(title, self.faults, self.right, self.on_error, note)
        if unused := self._unused.lines():
            note(describe_faults(f"{name} has keys that are not used", unused))


def _nothing(label: str, given: int, sources: Sources, forms: str) -> str:
    """The message on a source without records."""
    if not given:
        return f"{label}: found no records, expected {forms} in each row"
    side = "held out" if sources.held_out else "left"
    return (
        f"{label}: of {number_of(given, 'record')} none is {side} with data.eval_share={sources.share}: "
        "expected another share, or data.eval_path"
    )


def settle_faults(title: str, faults: Sequence[tuple[str, str]], right: int, on_error: OnError, note: Note) -> None:
    """Raises one UserError for all faults, or notes what is left out because of them; does nothing if there are none.

    Args:
        faults: (place, fault) pairs.
        right: how many are without fault; if none is, there is nothing to continue with, and "skip" raises too.
    """
    if not faults:
        return
    if on_error == "skip" and right:
        notes = as_notes(note)
        for place, fault in faults:
            notes.leave_out(place, fault)
        notes(describe_faults(f"{title} and are left out", group_faults(faults)))
        return
    hint = '; data.on_error="skip" (--on_error=skip) leaves them out' if right else ""
    raise UserError(describe_faults(title + hint, group_faults(faults)))


def check_record(record: Any) -> list[str]:
    """The faults of a record, as "found ..., expected ..." sentences; empty if it has none."""
    if not isinstance(record, dict):
        return [f"found {kind_of(record)}, expected {_FORMS}"]
    if "messages" in record:
        faults = message_faults("messages", record["messages"])
        if not faults and not any(message["role"] == "assistant" for message in record["messages"]):
            faults = ["messages: found no assistant message, expected at least one, since its text is what is learned"]
        return faults
    missing = [field for field in ("prompt", "completion") if field not in record]
    if missing:
        return [f"found the fields {sorted(record)} without {' and '.join(missing)}{_hint(record)}, expected {_FORMS}"]
    return side_faults("prompt", record["prompt"]) + completion_faults("completion", record["completion"])


def _hint(record: Record) -> str:
    """A hint at what an invalid row looks like, for the message about it."""
    if {"chosen", "rejected"} <= set(record):
        return " (a pair, which algorithms that learn from preferences read)"
    if "prompt" in record and (words := answer(record)) is not None and words.strip() not in str(record["prompt"]):
        name = next(key for key, value in record.items() if value is words)
        return f" (rename {name} to completion)"
    return ""


def _accept(row: Any) -> Accepted:
    if not isinstance(row, dict):
        return Accepted([], check_record(row))
    given = row
    row, faults, unused = normal_row(row, ("prompt", "completion"))
    if faults:
        return Accepted([], faults)
    read, form = ("messages",), None
    # A prompt without a completion, beside an instruction and an answer, is often both of those written out.
    written_out = "completion" not in row and row.get("instruction") and asks(row) and answer(row) is not None
    if "messages" in row:
        form = chat_form(given, ("messages",))
    elif "prompt" in row and not written_out:
        read, form = ("prompt", "completion"), Form("prompts and completions", ("prompt", "completion"))
    elif asks(row) and (answer(row) is not None or not {"chosen", "rejected"} <= set(row)):
        try:
            row, read, form = as_chat(row), ("messages", "history"), question_form(question_keys(row))
        except UserError as error:
            return Accepted([], [str(error)])
    elif isinstance(row.get("text"), str) and row["text"].strip():
        row, read = {**row, "prompt": "", "completion": row["text"]}, ("prompt", "completion", "text")
        form = Form("texts", ("text",))
    media, shown = media_faults(row)
    if faults := check_record(row) + media:
        return Accepted([], faults)
    row, faults, idle = with_system(row, read[0])
    answers = "completion" if read[0] == "prompt" else "messages"
    if isinstance(row[read[0]], str) and isinstance(row["completion"], str):
        idle += unused_template_fields(row)
    beside = unused_keys(row, read, answers=answers)
    return Accepted([row], faults, unused + idle + shown + beside, form)
