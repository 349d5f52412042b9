"""Reading the records of files, and reporting what was found and expected in every invalid row."""

import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from jlora.data.files import digest, rows
from jlora.data.forms import (
    Record,
    answer,
    as_chat,
    asks,
    media_faults,
    normal_row,
    unused_keys,
    unused_template_fields,
    with_system,
)
from jlora.data.messages import completion_faults, kind_of, message_faults, side_faults
from jlora.errors import UserError, describe_faults, group_faults

__all__ = ["Accepted", "Note", "OnError", "Record", "check_record", "digest", "read_records", "read_rows"]

OnError = Literal["raise", "skip"]
Note = Callable[[str], None]

_FORMS = (
    'an object with "messages" (or "conversations"), with "prompt" and "completion", or with a question and an answer '
    '("instruction", "input" and "output")'
)


class Placed(dict):
    """A record that knows its place, such as "train.jsonl:7", for messages about it."""

    __slots__ = ("place",)

    def __init__(self, record: Record, place: str) -> None:
        super().__init__(record)
        self.place = place

    def __reduce__(self) -> tuple:
        return Placed, (dict(self), self.place)


def place_of(record: Record, index: int) -> str:
    """A record's place; for one that is not from a file, its number."""
    return record.place if isinstance(record, Placed) else f"record {index + 1}"


class Accepted(NamedTuple):
    """What becomes of a row: its records, its faults, and notes on keys that another loader would have used."""

    records: list[Record]
    faults: list[str]
    unused: Sequence[str] = ()


Accept = Callable[[Any], Accepted]


def warn(message: str) -> None:
    """The default for `note`: issues a Python warning."""
    warnings.warn(message, stacklevel=4)


def read_records(path: str | pathlib.Path, *, on_error: OnError = "raise", note: Note = warn) -> list[Record]:
    """The records of a file (see `read_rows`), in order, with all their keys.

    A record is `{"messages": [{"role": ..., "content": ...}, ...]}` with at least one assistant message, or
    `{"prompt": ..., "completion": ...}` where both are text or lists of messages. With "messages" present, "prompt" is
    just another key that is kept. "tools" (a list) and "chat_template_kwargs" (an object) go to the chat template.

    Rows of Alpaca (an instruction with its input, or a question, and the output) and of ShareGPT ("conversations") get
    "messages"; a "system" beside them becomes the first of these. A turn that is marked as not trained, in whatever
    spelling, has "train": False.

    Raises:
        UserError: see `read_rows`.
    """
    return read_rows(path, _accept, _FORMS, on_error=on_error, note=note)


def iterate_records(path: str | pathlib.Path, *, on_error: OnError = "raise", note: Note = warn) -> Iterator[Record]:
    """The records of `read_records`, one after another; see `iterate_rows`."""
    return iterate_rows(path, _accept, _FORMS, on_error=on_error, note=note)


def read_rows(
    path: str | pathlib.Path, accept: Accept, forms: str, *, on_error: OnError = "raise", note: Note = warn
) -> list[Record]:
    """The records that `accept` makes of the rows of a file or of a folder of `datasets`, in order.

    Files are JSONL, a JSON array, .parquet or .arrow; text may be gzipped. Tables need the extra "datasets".

    Args:
        accept: row → its records and faults.
        forms: what a row should be, for error messages.
        on_error: "raise", or "skip" to leave out invalid rows and note them.
        note: called with messages on rows that are left out, and on keys that are not used.

    Raises:
        UserError: the file does not exist or is of another kind; a row is invalid (all are named as path:number, each
            kind of fault once); there are no rows, or no valid ones.
    """
    return list(iterate_rows(path, accept, forms, on_error=on_error, note=note))


def iterate_rows(
    path: str | pathlib.Path, accept: Accept, forms: str, *, on_error: OnError = "raise", note: Note = warn
) -> Iterator[Record]:
    """The records of `read_rows`, one after another.

    What is wrong with the rows is raised or noted at the end. If it will be raised, no record comes after the first
    invalid row.
    """
    path = pathlib.Path(path)
    faults, unused, wrong, count, right = [], [], 0, 0, 0
    for place, row in rows(path):
        found = Accepted([], [str(row)]) if isinstance(row, UserError) else accept(row)
        count += 1
        wrong += bool(found.faults)
        faults += [(place, fault) for fault in found.faults]
        if not found.faults:
            right += len(found.records)
            unused += [(place, one) for one in found.unused]
            if on_error == "skip" or not faults:
                yield from (Placed(record, place) for record in found.records)
    settle_faults(f"{path}: {wrong} of {count} records cannot be used", faults, right, on_error, note)
    if not right:
        raise UserError(f"{path}: found no records, expected {forms} in each row")
    if unused:
        note(describe_faults(f"{path} has keys that are not used", group_faults(unused)))


def settle_faults(title: str, faults: Sequence[tuple[str, str]], right: int, on_error: OnError, note: Note) -> None:
    """Raises one UserError for all faults, or notes what is left out because of them; does nothing if there are none.

    Args:
        faults: (place, fault) pairs.
        right: how many are without fault; if none is, there is nothing to continue with, and "skip" raises too.
    """
    if not faults:
        return
    if on_error == "skip" and right:
        note(describe_faults(f"{title} and are left out", group_faults(faults)))
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
    return ' (a text alone is {"prompt": "", "completion": TEXT})' if isinstance(record.get("text"), str) else ""


def _accept(row: Any) -> Accepted:
    if not isinstance(row, dict):
        return Accepted([], check_record(row))
    row, faults, unused = normal_row(row, ("prompt", "completion"))
    if faults:
        return Accepted([], faults)
    read = ("messages",)
    # A prompt without a completion, beside an instruction and an answer, is often both of those written out.
    written_out = "completion" not in row and row.get("instruction") and asks(row) and answer(row) is not None
    if "messages" not in row and "prompt" in row and not written_out:
        read = ("prompt", "completion")
    elif "messages" not in row and asks(row) and (answer(row) is not None or not {"chosen", "rejected"} <= set(row)):
        try:
            row, read = as_chat(row), ("messages", "history")
        except UserError as error:
            return Accepted([], [str(error)])
    media, shown = media_faults(row)
    if faults := check_record(row) + media:
        return Accepted([], faults)
    row, faults, idle = with_system(row, read[0])
    answers = "completion" if read[0] == "prompt" else "messages"
    if isinstance(row[read[0]], str) and isinstance(row["completion"], str):
        idle += unused_template_fields(row)
    return Accepted([row], faults, unused + idle + shown + unused_keys(row, read, answers=answers))
