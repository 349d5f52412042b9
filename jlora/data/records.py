"""JSONL records: reading them, and saying for every bad line what was found and what was expected."""

import json
import pathlib
from typing import Any

Record = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN_FAULTS = 50
_FORMS = 'an object with "messages", or with "prompt" and "completion"'


def read_records(path: str | pathlib.Path) -> list[Record]:
    """The records of a JSONL file, in order, with all their keys; blank lines are passed over.

    A record is `{"messages": [{"role": ..., "content": ...}, ...]}` with at least one assistant message, or
    `{"prompt": ..., "completion": ...}` where both are text or lists of messages. With "messages" present, "prompt" is
    just another key that is kept.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise FileNotFoundError(f"{path}: found {found}, expected a JSONL file of records, {_FORMS} on each line")
    records, faults = [], []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = _parse(line)
                line_faults = check_record(record)
            except ValueError as error:
                line_faults = [str(error)]
            faults += [f"{path}:{number}: {fault}" for fault in line_faults]
            if not line_faults:
                records.append(record)
    if faults:
        raise ValueError(describe_faults(f"{path} has records that cannot be trained on", faults))
    if not records:
        raise ValueError(f"{path}: found no records, expected {_FORMS} on each line")
    return records


def check_record(record: Any) -> list[str]:
    """What is wrong with a record, as "found ..., expected ..." sentences; empty when it is fine."""
    if not isinstance(record, dict):
        return [f"found {_kind(record)}, expected {_FORMS}"]
    if "messages" in record:
        faults = _message_faults("messages", record["messages"])
        if not faults and not any(message["role"] == "assistant" for message in record["messages"]):
            faults = ["messages: found no assistant message, expected at least one, since its text is what is learned"]
        return faults
    missing = [field for field in ("prompt", "completion") if field not in record]
    if missing:
        return [f"found the fields {sorted(record)} without {' and '.join(missing)}, expected {_FORMS}"]
    return _side_faults("prompt", record["prompt"]) + _completion_faults(record["completion"])


def describe_faults(title: str, faults: list[str]) -> str:
    """One message with every fault on its own line; a very long list ends with the number of the rest."""
    rest = [f"... and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    return f"{title}:\n  " + "\n  ".join(faults[:SHOWN_FAULTS] + rest)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"found a byte that is not UTF-8 at column {error.start + 1}, expected UTF-8 text") from error
    except json.JSONDecodeError as error:
        start = line.decode("utf-8-sig").strip()[:40]
        raise ValueError(f"found {start!r}, expected one line of JSON ({error.msg}, column {error.colno})") from error


def _side_faults(field: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return []
    if isinstance(value, list):
        return _message_faults(field, value)
    return [f"{field}: found {_kind(value)}, expected text or a list of messages"]


def _completion_faults(value: Any) -> list[str]:
    faults = _side_faults("completion", value)
    if faults:
        return faults
    if isinstance(value, str):
        return [] if value else ["completion: found empty text, expected the text to learn"]
    if not any(message["role"] == "assistant" for message in value):
        return ["completion: found no assistant message, expected at least one"]
    return []


def _message_faults(field: str, messages: Any) -> list[str]:
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else _kind(messages)
        return [f"{field}: found {found}, expected a list of messages"]
    faults = []
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            faults.append(f'{where}: found {_kind(message)}, expected an object with "role" and "content"')
            continue
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            faults.append(f"{where}.role: found {role!r}, expected one of {', '.join(ROLES)}")
        if role == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            found = _kind(content) if "content" in message else "no such field"
            faults.append(f"{where}.content: found {found}, expected text")
        elif role == "assistant" and not content:
            faults.append(f"{where}.content: found empty text, expected what the assistant says")
    return faults


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
