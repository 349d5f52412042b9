"""Records of JSONL, Parquet and Arrow files: reading them, and saying what was found and expected in every bad line."""

import json
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from jlora.errors import MissingFileError, UserError, describe_faults
from jlora.types import require

Record = dict[str, Any]
Accept = Callable[[Any], tuple[list[Record], list[str]]]

ROLES = ("system", "developer", "user", "assistant", "tool")
TEMPLATE_FIELDS = {"tools": list, "chat_template_kwargs": dict}
_FORMS = 'an object with "messages", or with "prompt" and "completion"'


def read_records(path: str | pathlib.Path) -> list[Record]:
    """The records of a file (see `read_rows`), in order, with all their keys.

    A record is `{"messages": [{"role": ..., "content": ...}, ...]}` with at least one assistant message, or
    `{"prompt": ..., "completion": ...}` where both are text or lists of messages. With "messages" present, "prompt" is
    just another key that is kept. "tools" (a list) and "chat_template_kwargs" (an object) go to the chat template.
    """
    return read_rows(path, _accept, _FORMS)


def read_rows(path: str | pathlib.Path, accept: Accept, forms: str) -> list[Record]:
    """What `accept` makes of the rows of a JSONL, .parquet or .arrow file or of a folder of `datasets`, in order.

    Blank lines of JSONL are passed over. All but JSONL needs the extra "datasets".

    Args:
        accept: (row) → (its records, what is wrong with it as "found ..., expected ..." sentences).
        forms: what a row should be, for the messages.

    Raises:
        FileNotFoundError, ValueError: no such file; a row that is wrong (all are named, as path:number); no rows.
    """
    path = pathlib.Path(path)
    if not path.exists() or (path.is_dir() and not (path / "state.json").exists()):
        found = "nothing there"
        if path.is_dir():
            splits = (path / "dataset_dict.json").exists()
            found = "a folder of several splits (give one of them)" if splits else "a folder"
        raise MissingFileError(
            f"{path}: found {found}, expected a JSONL file of records, {forms} on each line, or .parquet or .arrow"
        )
    records, faults = [], []
    for number, row in _rows(path):
        try:
            row_records, row_faults = accept(_parse(row) if isinstance(row, bytes) else row)
        except UserError as error:
            row_records, row_faults = [], [str(error)]
        faults += [f"{path}:{number}: {fault}" for fault in row_faults]
        if not row_faults:
            records += row_records
    if faults:
        raise UserError(describe_faults(f"{path} has records that cannot be trained on", faults))
    if not records:
        raise UserError(f"{path}: found no records, expected {forms} on each line")
    return records


def digest(path: str | pathlib.Path) -> str:
    """Eight hex digits that follow from every byte of a file, or of the files in a folder."""
    path, found = pathlib.Path(path), 0
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                while block := stream.read(2**24):
                    found = zlib.crc32(block, found)
    return f"{found:08x}"


def check_record(record: Any) -> list[str]:
    """What is wrong with a record, as "found ..., expected ..." sentences; empty when it is fine."""
    if not isinstance(record, dict):
        return [f"found {kind_of(record)}, expected {_FORMS}"]
    if "messages" in record:
        faults = message_faults("messages", record["messages"])
        if not faults and not any(message["role"] == "assistant" for message in record["messages"]):
            faults = ["messages: found no assistant message, expected at least one, since its text is what is learned"]
        return faults
    missing = [field for field in ("prompt", "completion") if field not in record]
    if missing:
        return [f"found the fields {sorted(record)} without {' and '.join(missing)}, expected {_FORMS}"]
    return side_faults("prompt", record["prompt"]) + completion_faults("completion", record["completion"])


def _accept(row: Any) -> tuple[list[Record], list[str]]:
    if faults := check_record(row):
        return [], faults
    record, faults = with_template_fields(row)
    return [record], faults


def with_template_fields(row: Record) -> tuple[Record, list[str]]:
    """The row without fields for the chat template that are null, its tools as a list, and what is wrong with these."""
    faults = []
    row = {key: value for key, value in row.items() if value is not None or key not in TEMPLATE_FIELDS}
    if isinstance(row.get("tools"), str):
        try:
            row["tools"] = json.loads(row["tools"])
        except json.JSONDecodeError as error:
            faults.append(f"tools: found text that is not JSON ({error.msg}), expected a list of tools")
            del row["tools"]
    for name, expected in TEMPLATE_FIELDS.items():
        if not isinstance(row.get(name, expected()), expected):
            faults.append(f"{name}: found {kind_of(row[name])}, expected {kind_of(expected())}")
    return row, faults


def _rows(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of every row; a row of JSONL is a line yet to be parsed, and blank ones are left out."""
    if path.is_dir():
        rows = require("datasets", "datasets").load_from_disk(str(path)).with_format(None)
    elif path.suffix in (".parquet", ".arrow"):
        rows = _table_rows(path)
    else:
        with path.open("rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        return
    yield from ((number, _without_nulls(row)) for number, row in enumerate(rows, start=1))


def _table_rows(path: pathlib.Path) -> Iterator[Record]:
    arrow = require("pyarrow", "datasets")
    try:
        if path.suffix == ".parquet":
            with require("pyarrow.parquet", "datasets").ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
            return
        with arrow.memory_map(str(path)) as source:
            opened = arrow.ipc.open_file if source.read(6) == b"ARROW1" else arrow.ipc.open_stream
            source.seek(0)
            for batch in opened(source).read_all().to_batches():
                yield from batch.to_pylist()
    except arrow.ArrowInvalid as error:
        raise UserError(f"{path}: found no file of the kind that its name says ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Arrow gives every row all the keys of its column; those that a row did not have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"found a byte that is not UTF-8 at column {error.start + 1}, expected UTF-8 text") from error
    except json.JSONDecodeError as error:
        start = line.decode("utf-8-sig").strip()[:40]
        raise UserError(f"found {start!r}, expected one line of JSON ({error.msg}, column {error.colno})") from error


def side_faults(field: str, value: Any) -> list[str]:
    """What is wrong with a prompt or an answer: text or a list of messages."""
    if isinstance(value, str):
        return []
    if isinstance(value, list):
        return message_faults(field, value)
    return [f"{field}: found {kind_of(value)}, expected text or a list of messages"]


def completion_faults(field: str, value: Any) -> list[str]:
    """What is wrong with an answer: `side_faults`, and that there must be something in it to learn."""
    faults = side_faults(field, value)
    if faults:
        return faults
    if isinstance(value, str):
        return [] if value else [f"{field}: found empty text, expected the text to learn"]
    if not any(message["role"] == "assistant" for message in value):
        return [f"{field}: found no assistant message, expected at least one"]
    return []


def message_faults(field: str, messages: Any) -> list[str]:
    """What is wrong with a list of messages."""
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else kind_of(messages)
        return [f"{field}: found {found}, expected a list of messages"]
    faults = []
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            faults.append(f'{where}: found {kind_of(message)}, expected an object with "role" and "content"')
            continue
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            faults.append(f"{where}.role: found {role!r}, expected one of {', '.join(ROLES)}")
        if role == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            found = kind_of(content) if "content" in message else "no such field"
            faults.append(f"{where}.content: found {found}, expected text")
        elif role == "assistant" and not content:
            faults.append(f"{where}.content: found empty text, expected what the assistant says")
    return faults


def kind_of(value: Any) -> str:
    """A value's kind in words, as JSON has it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
