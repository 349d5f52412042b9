"""Rows as other tools write them: read into one form, or named; a key that a loader knows is never passed over."""

import itertools
import json

import pytest

from jlora.data import read_preferences, read_prompts, read_records
from jlora.errors import UserError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM, OTHER = {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}
CHAT = [SYSTEM, USER, ANSWER]
CALL = {"name": "f", "arguments": {"x": 1}}


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


def kto(path, **settings):
    return read_preferences(path, "unpaired", **settings)


def fault(folder, row, reader=read_records):
    with pytest.raises(UserError) as error:
        read(folder, row, reader=reader)
    assert f"{folder / 'data.jsonl'}:1: " in str(error.value)
    return str(error.value)


FORMS = {
    "messages": {"messages": CHAT},
    "system beside": {"system": "s", "messages": CHAT[1:]},
    "system twice": {"system": "s", "messages": CHAT},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ]
    },
    "sharegpt with system": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "system": "s",
    },
    "from in messages": {"messages": [{"from": one["role"], "value": one["content"]} for one in CHAT]},
    "conversation": {"conversation": CHAT},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "system": "s"},
    "orca": {"system_prompt": "s", "question": "q", "response": "a"},
    "gsm8k": {"system": "s", "question": "q", "answer": "a"},
    "query": {"system": "s", "query": "q", "response": "a"},
    "input and output": {"system": "s", "input": "q", "output": "a"},
    "parts": {"messages": [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in CHAT]},
    "parts of text": {
        "messages": [SYSTEM, {**USER, "content": ["q"]}, {**ANSWER, "content": [{"text": "a"}, {"text": ""}]}]
    },
    "empty tools": {"messages": CHAT, "tools": ""},
    "no tools": {"messages": CHAT, "tools": [], "functions": None, "images": [], "history": []},
    "all trained": {"messages": [SYSTEM, USER, {**ANSWER, "weight": 1, "train": True, "masked": False}]},
}


@pytest.mark.parametrize("name", FORMS)
def test_one_chat_in_every_form_is_one_record(tmp_path, name):
    [record] = read(tmp_path, {**FORMS[name], "id": 7})
    assert (record["messages"], record.get("tools"), record["id"]) == (CHAT, None, 7)
    [record] = read(tmp_path, {**FORMS[name], "id": 7}, reader=read_prompts)
    assert (record["prompt"], record["completion"], record["id"]) == (CHAT[:2], "a", 7)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, USER]},
        {"prompt": [USER], "system": "s"},
        {"question": "q", "system": "s"},
        {"instruction": "q", "input": "", "system_prompt": "s"},
        {"input": "q", "system": "s"},
        {"conversations": [{"from": "human", "value": "q"}], "system": "s"},
        {"messages": [SYSTEM, USER]},
        {"prompt": "q", "system": "s", "answers": "messages"},
        {
            "conversations": [SYSTEM, USER],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"messages": [SYSTEM, USER, ANSWER]},
    ],
)
def test_one_pair_in_every_form_is_one_record(tmp_path, row):
    if row.get("answers"):
        row = row | {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
        del row["answers"]
    [record] = read(tmp_path, {"chosen": "a", "rejected": "b"} | row, reader=pairs)
    assert (record["prompt"], record["chosen"], record["rejected"]) == ([SYSTEM, USER], [ANSWER], [OTHER])
    good, bad = read(tmp_path, {"chosen": "a", "rejected": "b"} | row, reader=kto)
    assert (good["prompt"], good["completion"], good["label"]) == ([SYSTEM, USER], [ANSWER], True)
    assert (bad["prompt"], bad["completion"], bad["label"]) == ([SYSTEM, USER], [OTHER], False)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "response": "a", "label": True},
        {"messages": [USER, ANSWER], "kto_tag": True},
        {"conversations": [USER, {"from": "gpt", "value": "a"}], "label": True},
        {"conversations": [USER], "completion": "a", "label": True},
    ],
)
def test_a_single_answer_in_every_form_is_one_record(tmp_path, row):
    [record] = read(tmp_path, row, reader=kto)
    assert (record["prompt"], record["completion"], record["label"]) == ([USER], [ANSWER], True)


def test_rankings_have_their_question_under_any_name(tmp_path):
    row = {"system": "s", "instruction": "q", "completions": ["a", "b"], "scores": [2, 1]}
    [record] = read(tmp_path, row, reader=pairs)
    assert (record["prompt"], record["chosen"], record["rejected"]) == ([SYSTEM, USER], [ANSWER], [OTHER])


def test_an_instruction_and_its_input_are_one_message_behind_the_history(tmp_path):
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["q", "a"]]}
    [record] = read(tmp_path, row)
    told = {"role": "user", "content": "Add.\n\n1, 2"}
    assert record["messages"] == [USER, ANSWER, told, {"role": "assistant", "content": "3"}]
    [record] = read(tmp_path, row | {"chosen": "3", "rejected": "4"}, reader=pairs, note=lambda message: None)
    assert record["prompt"] == [USER, ANSWER, told]


@pytest.mark.parametrize(
    "key",
    ["weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_mask", "loss_weight", "loss_scale"],
)
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_every_spelling_of_an_untrained_turn_is_one(tmp_path, key, no):
    for words in ({"role": "assistant", "content": "b"}, {"from": "gpt", "value": "b"}):
        [record] = read(tmp_path, {"messages": [USER, {**words, key: no}, {**USER, key: no}, {**ANSWER, key: 1}]})
        assert record["messages"] == [USER, {**OTHER, "train": False}, USER, ANSWER]


def test_masked_is_the_other_way_round_and_null_says_nothing(tmp_path):
    rows = [{"messages": [USER, {**ANSWER, "masked": masked, "weight": None}]} for masked in (True, False, None)]
    assert [record["messages"][1].get("train") for record in read(tmp_path, *rows)] == [False, None, None]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({**ANSWER, "weight": 0.5}, "messages[1].weight: found 0.5, expected true or false"),
        ({**ANSWER, "train": "no"}, 'messages[1].train: found "no", expected true or false'),
        ({**ANSWER, "weight": float("nan")}, "messages[1].weight: found NaN, expected true or false"),
        ({**ANSWER, "weight": 1, "train": False}, "found weight and train, which say different things"),
        ({**ANSWER, "train_detail": [{"begin": 0}]}, "messages[1].train_detail: found"),
        (
            {**ANSWER, "content": [{"type": "image_url", "image_url": {}}]},
            "found a part of type 'image_url', expected text",
        ),
        ({**ANSWER, "content": [{"type": "text", "text": 3}]}, "content[0].text: found a number, expected text"),
        ({**ANSWER, "content": [3]}, "content[0].text: found a number, expected text"),
        ({**ANSWER, "content": [{"type": ["text"]}]}, "found a part of type ['text']"),
        ({"from": "robot", "value": "a"}, "messages[1].from: found 'robot', expected one of"),
        ({"from": ["gpt"], "value": "a"}, "messages[1].from: found ['gpt']"),
        ({"from": "gpt"}, "messages[1].content: found no such field"),
        ({"from": "function_call", "value": "{"}, "messages[1].value: found '{', expected a call as JSON"),
        ({"from": "function_call", "value": "[3]"}, "messages[1].value: found a list, expected a call as JSON"),
        ({"role": "assistant", "function_call": "f"}, "function_call: found text, expected an object with name"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": float("inf")}}]},
            "found NaN or Infinity",
        ),
    ],
)
def test_a_message_that_cannot_be_read_as_it_stands_is_named(tmp_path, message, words):
    training = "weight" in message or "train" in words
    for reader in (read_records, pairs, *(() if training else (read_prompts,))):
        assert words in fault(tmp_path, {"messages": [USER, message], "chosen": "a", "rejected": "b"}, reader)


def test_calls_and_results_of_older_formats_are_tool_calls(tmp_path):
    expected = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "r"},
        ANSWER,
    ]
    sharegpt = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a"},
    ]
    older = [
        USER,
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "function", "content": "r"},
        ANSWER,
    ]
    function = {"name": "f", "parameters": {}}
    one, two = read(tmp_path, {"conversations": sharegpt}, {"messages": older, "functions": [function]})
    assert (one["messages"], two["messages"]) == (expected, expected)
    assert two["tools"] == [{"type": "function", "function": function}]


NOTED = [
    ({"prompt": "another"}, "prompt: not used: the prompt is read from messages"),
    ({"prompt": [{"role": "user", "content": "another"}]}, "prompt: not used"),
    ({"label": False}, "label: not used: every answer is learned"),
    ({"weight": 0.5}, "weight: not used: every record counts the same"),
    ({"train": False}, "train: not used"),
    ({"loss_mask": 0}, "loss_mask: not used"),
    ({"question": "another?"}, "question: not used: the prompt is read from"),
    ({"instruction": "another"}, "instruction: not used"),
    ({"input": "another"}, "input: not used"),
    ({"output": "another"}, "output: not used"),
    ({"response": "another"}, "response: not used"),
    ({"history": [["q", "a"]]}, "history: not used"),
    ({"chosen": "x", "rejected": "y"}, "chosen: not used"),
    ({"functions": [{"name": "f"}]}, "functions: not used"),
    ({"tool_choice": "auto"}, "tool_choice: not used"),
    ({"thinking": "hm"}, "thinking: not used"),
    ({"system": "other", "messages": CHAT}, "system: not used: the chat has a system message of its own"),
    ({"messages": [{**USER, "train": True}, ANSWER]}, "train: not used with messages of the user"),
]


@pytest.mark.parametrize(("beside", "words"), NOTED, ids=[next(iter(beside)) for beside, _ in NOTED])
def test_keys_that_other_loaders_read_are_named_once(tmp_path, beside, words):
    notes = []
    row = {"messages": [USER, ANSWER], **beside}
    records = read(tmp_path, *[row] * 5, note=notes.append)
    [note] = notes
    path = tmp_path / "data.jsonl"
    assert f"{path}:1, :2, :3 and 2 more: " in note
    assert words in note
    assert all(record[key] == row[key] for record in records for key in beside if key != "messages")


@pytest.mark.parametrize(
    "beside",
    [
        {"id": 1},
        {"source": "web"},
        {"answer": "42"},
        {"score": 0.5},
        {"prompt": "q"},
        {"label": True},
        {"weight": 1.0},
        {"question": "q"},
        {"output": "a"},
        {"ground_truth": {"a": 1}},
        {"functions": []},
        {"functions": [{"name": "q"}, {"name": "a"}]},
        {"conversations": []},
    ],
)
def test_keys_that_nothing_is_lost_of_are_kept_without_a_word(tmp_path, beside):
    assert read(tmp_path, {"messages": [USER, ANSWER], **beside}) == [{"messages": [USER, ANSWER], **beside}]


def test_what_plain_text_and_messages_leave_out_of_prompts_is_named(tmp_path):
    tools = {"tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}}
    for reader in (read_records, read_prompts):
        notes = []
        read(tmp_path, {"prompt": "q", "completion": "a", **tools}, reader=reader, note=notes.append)
        for name in tools:
            assert f"{name}: not used: it is for the chat template" in notes[0]
        read(tmp_path, {"prompt": [USER], "completion": "a", **tools}, reader=reader)
    notes = []
    [record] = read(tmp_path, {"prompt": "other", "messages": [USER]}, reader=read_prompts, note=notes.append)
    assert record["prompt"] == [USER]
    assert "prompt: not used: the prompt is read from messages" in notes[0]
    for same in ("q", [USER], 3):
        read(tmp_path, {"prompt": same, "messages": [USER, ANSWER]}, reader=read_prompts)


def test_nothing_is_said_of_the_columns_of_prompts(tmp_path):
    row = {"prompt": [USER], "question": "other", "output": "x", "label": False, "functions": [1], "weight": 0}
    assert read(tmp_path, row, reader=read_prompts) == [row]


@pytest.mark.parametrize("reader", [read_records, pairs])
@pytest.mark.parametrize("key", ["images", "videos", "audios", "image"])
def test_what_no_model_is_shown_is_refused(tmp_path, reader, key):
    row = {"messages": [USER, ANSWER], "prompt": [USER], "chosen": "a", "rejected": "b", key: ["x.png"]}
    assert f"{key}: found it beside the text, expected text only" in fault(tmp_path, row, reader)


@pytest.mark.parametrize("reader", [read_records, pairs])
def test_a_system_text_beside_plain_text_is_refused_unless_it_is_in_there(tmp_path, reader):
    row = {"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b", "system": "Be brief."}
    assert 'system: found it beside plain text, expected "prompt" as messages' in fault(tmp_path, row, reader)
    inside = row | {"prompt": "Be brief. q"}
    assert read(tmp_path, inside, reader=reader, note=lambda message: None)[0]["prompt"] == "Be brief. q"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "question": "b", "output": "c"}, "found instruction and question, expected one of"),
        (
            {"question": "a", "context": "b", "answer": "c"},
            "found question and context, expected a question in one piece",
        ),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "found instruction and input and context"),
        ({"instruction": "a", "history": ["x"], "output": "d"}, "history: found a list, expected a list of [question"),
        ({"instruction": "a", "history": 3, "output": "d"}, "history: found a number"),
        ({"instruction": "a"}, "found a question without an answer, expected one of output, response, answer"),
        ({"instruction": "a", "output": ""}, "output: found empty text, expected the text to learn"),
        ({"question": "a", "answer": 4}, "answer: found a number, expected the text to learn"),
        ({"prompt": "a", "response": "b"}, "without completion (rename response to completion)"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "(a pair, which algorithms that learn from preferences read)",
        ),
        ({"text": " "}, "found the fields ['text'] without prompt and completion"),
    ],
)
def test_a_row_that_could_be_read_in_two_ways_or_none_says_what_to_do(tmp_path, row, words):
    assert words in fault(tmp_path, row)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "Four.", "rejected": "Five."},
        {"chosen": "Ein Hund hat vier.", "rejected": "Ein Hund hat fünf.", "frage": "Wie viele Beine hat ein Hund?"},
        {"chosen": "x", "rejected": "y", "frage": "Welches Zeichen?"},
        {"chosen": "one two", "rejected": "one"},
    ],
)
def test_letters_that_two_answers_share_are_not_a_prompt(tmp_path, row):
    for reader in (pairs, kto):
        assert "found no prompt, but " in fault(tmp_path, row, reader)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: I do.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: It is.",
                "from": "a b",
            },
            "\n\nHuman: Hi\n\nAssistant: I",
        ),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green.", "id": "a"}, "The sky is"),
        ({"chosen": "x", "rejected": "y"}, ""),
    ],
)
def test_a_start_that_two_texts_share_is_a_prompt_as_trl_has_it(tmp_path, row, prompt):
    [record] = read(tmp_path, row, reader=pairs)
    assert record["prompt"] == prompt


def test_messages_beside_a_pair_must_be_what_it_answers(tmp_path):
    row = {"messages": [USER, OTHER], "chosen": "a", "rejected": "b"}
    assert "messages: found an assistant message at the end, expected" in fault(tmp_path, row, pairs)


def test_turns_of_a_pair_keep_that_they_are_not_trained(tmp_path):
    row = {"prompt": [USER], "chosen": [{**OTHER, "weight": 0}, USER, ANSWER], "rejected": [OTHER]}
    [record] = read(tmp_path, row, reader=pairs)
    assert record["chosen"] == [{**OTHER, "train": False}, USER, ANSWER]


def test_prompts_end_where_the_answer_begins(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    result = {"role": "tool", "content": "r"}
    rows = [
        {"messages": [USER, call, result]},
        {"prompt": [USER, call, result]},
        {"messages": [USER]},
        {"messages": [USER, ANSWER, USER]},
        {"question": "q", "answer": 4},
    ]
    found = read(tmp_path, *rows, reader=read_prompts)
    assert [record["prompt"] for record in found] == [[USER, call, result]] * 2 + [[USER], [USER, ANSWER, USER], [USER]]
    assert not any("completion" in record for record in found)
    assert "answers are started here" in fault(tmp_path, {"prompt": [USER, ANSWER]}, read_prompts)


@pytest.mark.parametrize("where", ["prompt", "completion", "id", "\\ud800", "tools"])
def test_half_a_character_is_refused_wherever_it_stands(tmp_path, where):
    path = tmp_path / "data.jsonl"
    row = {"prompt": [USER], "completion": [ANSWER], "id": "x", "tools": [{"name": "f"}]}
    text = json.dumps(row)
    line = {
        "prompt": text.replace('"q"', '"What? \\ud83d"'),
        "completion": text.replace('"a"', '"\\udc00 what"'),
        "id": text.replace('"x"', '"\\ud83d \\ud83d\\ude00"'),
        "\\ud800": text.replace('"id"', '"\\ud800"'),
        "tools": json.dumps({**row, "tools": '[{"name": "\\ud83d"}]'}),
    }[where]
    for reader in (read_records, read_prompts):
        path.write_text(text.replace('"q"', '"\\ud83d\\ude00"') + "\n" + line + "\n")
        with pytest.raises(UserError, match=r"data.jsonl:2: .*half of a character"):
            reader(path)


def test_a_few_bad_rows_can_be_left_out(tmp_path):
    good = {"messages": [USER, ANSWER], "prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [3 if number % 75 == 7 else good for number in range(300)]
    path = write(tmp_path, *rows)
    for reader, named in itertools.product((read_records, read_prompts, pairs, kto), ("raise", "skip")):
        if named == "raise":
            with pytest.raises(
                UserError,
                match=r"4 of 300 records cannot be used; data.on_error=\"skip\" \(--on_error=skip\) leaves them out",
            ):
                reader(path)
            continue
        notes = []
        assert len(reader(path, on_error="skip", note=notes.append)) == (592 if reader is kto else 296)
        assert "4 of 300 records cannot be used and are left out" in notes[0]
        assert f"{path}:8, :83, :158 and 1 more: found a number, expected" in notes[0]


def test_nothing_is_left_of_a_file_of_bad_rows(tmp_path):
    with pytest.raises(UserError, match="2 of 2 records cannot be used:"):
        read(tmp_path, 1, 2, on_error="skip")
