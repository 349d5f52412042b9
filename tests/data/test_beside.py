"""Rows of which only a part is read: what stands beside it neither takes its place nor refuses the row."""

import json

import pytest

from jlora.data import read_preferences, read_prompts, read_records
from jlora.errors import UserError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CHAT = [SYSTEM, USER, ANSWER]


def write(folder, *rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refuse(message):
    raise AssertionError(f"noted: {message}")


def read(folder, *rows, reader=read_records, note=refuse, **settings):
    return reader(write(folder, *rows), note=note, **settings)


def pairs(path, **settings):
    return read_preferences(path, "pairs", **settings)


def fault(folder, row, reader=read_records):
    with pytest.raises(UserError) as error:
        read(folder, row, reader=reader)
    assert f"{folder / 'data.jsonl'}:1: " in str(error.value)
    return str(error.value)


TURNS = {"user": {"from": "human", "value": "q"}, "gpt": {"from": "gpt", "value": "a"}}
IMAGE = [{"role": "assistant", "content": [{"type": "image"}]}]


@pytest.mark.parametrize("key", ["conversations", "conversation"])
@pytest.mark.parametrize("chat", [[], ["q", "a"]])
def test_what_is_no_chat_does_not_take_the_place_of_a_prompt(tmp_path, key, chat):
    row = {"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b", key: chat}
    for reader in (read_records, read_prompts, pairs):
        assert read(tmp_path, row, reader=reader, note=lambda message: None)[0]["prompt"] == "p"
    row = {"instruction": "q", "output": "a", key: chat}
    assert read(tmp_path, row, note=lambda message: None)[0]["messages"] == [USER, ANSWER]


def test_a_chat_beside_a_prompt_without_completion_is_read(tmp_path):
    [record] = read(tmp_path, {"prompt": "q", "conversations": list(TURNS.values())})
    assert record["messages"] == [USER, ANSWER]


@pytest.mark.parametrize(
    ("reader", "row"),
    [
        (read_records, {"messages": [USER, ANSWER], "rejected": IMAGE}),
        (read_records, {"messages": [USER, ANSWER], "prompt": IMAGE, "completion": IMAGE}),
        (read_records, {"prompt": "q", "completion": "a", "chosen": IMAGE, "completions": [IMAGE]}),
        (read_prompts, {"prompt": "q", "completions": [[{**ANSWER, "weight": 0.3}]], "chosen": IMAGE}),
        (pairs, {"prompt": "q", "chosen": "a", "rejected": "b", "messages": IMAGE}),
    ],
)
def test_faults_of_what_is_not_read_refuse_nothing(tmp_path, reader, row):
    assert len(read(tmp_path, row, reader=reader, note=lambda message: None)) == 1


@pytest.mark.parametrize("call", [{}, "", None, {"name": None, "arguments": None}])
def test_a_call_of_nothing_is_no_call(tmp_path, call):
    chat = [{**USER, "function_call": call}, {**ANSWER, "function_call": call}]
    assert read(tmp_path, {"messages": chat})[0]["messages"] == [USER, ANSWER]


@pytest.mark.parametrize("mark", [{"weight": 0.3}, {"train": "no"}, {"train_detail": [1]}])
def test_marks_on_what_is_never_trained_are_noted(tmp_path, mark):
    [key], notes = mark, []
    [record] = read(tmp_path, {"messages": [SYSTEM | mark, USER | mark, ANSWER]}, note=notes.append)
    assert record["messages"] == CHAT
    assert f"{key}: not used with messages of the user, which are never trained" in notes[0]
    for reader, row in (
        (read_prompts, {"messages": [USER, ANSWER | mark]}),
        (read_records, {"prompt": [USER, ANSWER | mark, USER], "completion": "c"}),
        (pairs, {"prompt": [USER, ANSWER | mark, USER], "chosen": "c", "rejected": "d"}),
    ):
        notes = []
        read(tmp_path, row, reader=reader, note=notes.append)
        assert f"{key}: not used in a prompt, which is never trained" in notes[0]


def test_a_system_column_beside_the_text_of_a_prompt_goes_to_the_rewards(tmp_path):
    notes = []
    row = {"prompt": "q", "system": "linux"}
    assert read(tmp_path, row, reader=read_prompts, note=notes.append) == [row]
    assert "system: not used: the prompt is plain text" in notes[0]


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"image": "debian:12"}, "noted"),
        ({"video": True}, "nothing"),
        ({"images": 3}, "nothing"),
        ({"image": "debian:12", "messages": [{**USER, "content": "<image>q"}, ANSWER]}, "refused"),
        ({"image": "a/b.jpg"}, "refused"),
        ({"audio": "https://host/sound"}, "refused"),
        ({"images": ["data:image/png;base64,AA"]}, "refused"),
        ({"image": {"bytes": "AA", "path": None}}, "refused"),
    ],
)
def test_a_key_of_pictures_holds_some_only_where_it_looks_so(tmp_path, beside, said):
    row = {"messages": [USER, ANSWER], **beside}
    if said == "refused":
        assert "found it beside the text, expected text only" in fault(tmp_path, row)
        return
    notes = []
    read(tmp_path, row, note=notes.append)
    assert bool(notes) == (said == "noted")


def test_a_system_text_is_not_found_in_another_word(tmp_path):
    notes = []
    chat = [{**SYSTEM, "content": "always brief"}, USER, ANSWER]
    read(tmp_path, {"system": "a", "messages": chat}, note=notes.append)
    assert "system: not used: the chat has a system message of its own" in notes[0]
    read(tmp_path, {"system": "always ", "messages": chat})
    row = {"prompt": "always brief", "completion": "b", "system": "a"}
    assert "system: found it beside plain text" in fault(tmp_path, row)


@pytest.mark.parametrize(
    ("reader", "row", "words"),
    [
        (
            read_records,
            {"prompt": "p", "completion": "c", "output": "x"},
            "output: not used: the answer is read from completion",
        ),
        (read_records, {"messages": CHAT, "output": "x"}, "output: not used: the answer is read from messages"),
        (
            pairs,
            {"prompt": "p", "chosen": "a", "rejected": "b", "output": "x"},
            "output: not used: the answer is read from chosen and rejected",
        ),
        (read_records, {"instruction": "q", "output": "a", "history": "none so far"}, "history: not used: found text"),
    ],
)
def test_notes_name_what_is_read_instead(tmp_path, reader, row, words):
    notes = []
    read(tmp_path, row, reader=reader, note=notes.append)
    assert words in "".join(notes)


def test_a_prompt_that_holds_the_answer_is_not_learned(tmp_path):
    written_out = "Below is an instruction.\n### Instruction:\nq\n### Response:\nan answer"
    row = {"instruction": "q", "input": "", "output": "an answer", "prompt": written_out}
    [record] = read(tmp_path, row, note=lambda message: None)
    assert record["messages"] == [USER, {**ANSWER, "content": "an answer"}]
    assert "rename" not in fault(tmp_path, {"output": "an answer", "prompt": written_out})


def test_a_chat_of_pairs_of_input_and_output_is_read(tmp_path):
    pair = {"input": "q", "output": "a"}
    assert read(tmp_path, {"conversation": [pair, pair]})[0]["messages"] == [USER, ANSWER] * 2


@pytest.mark.parametrize("key", ["conversations", "conversation"])
def test_faults_of_a_chat_have_the_name_in_the_file(tmp_path, key):
    found = fault(tmp_path, {key: [TURNS["user"], {"from": "gpt", "value": 3}]})
    assert f"{key}[1].content: found a number, expected text" in found
    assert "messages[" not in found


def test_an_answer_of_spaces_is_empty_text(tmp_path):
    assert "output: found empty text, expected" in fault(tmp_path, {"instruction": "q", "output": " "})


def test_tools_that_are_not_json_are_told_once(tmp_path):
    found = fault(tmp_path, {"messages": CHAT, "tools": "[{"})
    assert "tools: found '[{', expected a list of tools as JSON (" in found
    assert found.count("expected") == 1
