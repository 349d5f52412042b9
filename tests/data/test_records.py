"""Records: good ones are kept whole, and every bad line is named in one message."""

import json

import pytest

from jlora.data import iterate_records, read_records
from jlora.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "id": 7}


def test_reads_both_forms_with_their_extra_keys(tmp_path):
    records = [
        GOOD,
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": [{"role": "user", "content": "é?"}], "completion": [{"role": "assistant", "content": "é!"}]},
        {"prompt": 3, "messages": GOOD["messages"]},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text(
        "\ufeff" + "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n", "utf-8"
    )
    assert read_records(path) == records


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "expected one line of JSON"),
        ("[1, 2]", "found a list, expected an object"),
        ('"text"', "found text, expected an object"),
        ('{"prompt": "a"}', "found the fields ['prompt'] without completion"),
        ('{"words": "a"}', "without prompt and completion"),
        ('{"prompt": "a", "completion": ""}', "completion: found empty text"),
        ('{"prompt": 1, "completion": "b"}', "prompt: found a number, expected text or a list of messages"),
        ('{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}', "completion: found no assistant message"),
        ('{"messages": []}', "messages: found an empty list"),
        ('{"messages": null}', "messages: found null"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "messages: found no assistant message"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "messages[0].role: found 'bot', expected one of system"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "messages[0].role: found ['user']"),
        ('{"messages": [{"role": "assistant"}]}', "messages[0].content: found no such field, expected text"),
        ('{"messages": [{"role": "assistant", "content": 5}]}', "messages[0].content: found a number"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "messages[0].content: found empty text"),
        ('{"messages": ["hello"]}', "messages[0]: found text, expected an object"),
    ],
)
def test_names_the_line_what_was_found_and_what_was_expected(tmp_path, line, words):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError) as error:
        read_records(path)
    assert f"{path}:2: " in str(error.value)
    assert words in str(error.value)


def test_all_bad_lines_are_in_one_message(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"a": 1}\n' + json.dumps(GOOD).encode() + b'\n\n\xff\xfe\n{"messages": 1}\n')
    with pytest.raises(ValueError) as error:
        read_records(path)
    faults = str(error.value).splitlines()[1:]
    assert [fault.split(":")[1] for fault in faults] == ["1", "4", "5"]
    assert "not UTF-8" in faults[1]


def test_faults_of_one_kind_are_said_once(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("{}\n" * 60 + '{"messages": 1}\n')
    with pytest.raises(UserError) as error:
        read_records(path)
    title, *lines = str(error.value).splitlines()
    assert "61 of 61" in title
    assert lines[0].startswith(f"  {path}:1, :2, :3 and 57 more: found the fields [] without prompt")
    assert lines[1:] == [f"  {path}:61: messages: found a number, expected a list of messages"]


def test_empty_and_missing_files_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl: found no records"):
        read_records(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match=r"gone.jsonl: found nothing there, expected a JSONL file"):
        read_records(tmp_path / "gone.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="found a folder"):
        read_records(tmp_path / "folder")


def test_no_record_follows_an_invalid_row_that_ends_the_run(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"prompt": "a", "completion": "b"}
    path.write_text("\n".join(json.dumps(one) for one in (row, row, 3, row, 4)))
    notes = []
    assert list(iterate_records(path, on_error="skip", note=notes.append)) == [row] * 3
    assert "2 of 5 records cannot be used and are left out" in notes[0]
    rows = iterate_records(path)
    assert [next(rows), next(rows)] == [row] * 2
    with pytest.raises(UserError, match="2 of 5 records cannot be used"):
        next(rows)
