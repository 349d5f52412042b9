"""Preference records: TRL's formats give TRL's prompts, pairs and labels, and every bad line is named."""

import json

import datasets
import pyarrow.parquet
import pytest
import trl
from trl.data_utils import maybe_extract_prompt

from jlora.data import preference, read_preferences

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "g"}
BAD = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}


def write(folder, *records):
    path = folder / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(folder, *records, kind="pairs"):
    return read_preferences(write(folder, *records), kind)


def fault(folder, record, kind="pairs"):
    """What is said of a bad record on line 2."""
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError) as error:
        read(folder, good, record, kind=kind)
    [line] = str(error.value).splitlines()[1:]
    assert line.startswith(f"  {folder / 'data.jsonl'}:2: ")
    return line


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "The sky is blue.", "rejected": "The sky has none."},
        {"chosen": "x", "rejected": "y"},
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_pairs_have_the_prompt_that_trl_finds(tmp_path, record):
    assert read(tmp_path, {**record, "id": 3}) == [{**maybe_extract_prompt(record), "id": 3}]


@pytest.mark.parametrize(
    "texts", [("one two", "one"), ("one", "one two"), ("Four.", "Five."), ("\n\nA: I do", "\n\nA: It")]
)
def test_the_shared_start_is_trls(texts):
    found = maybe_extract_prompt(dict(zip(("chosen", "rejected"), texts, strict=True)))
    assert preference.extract_prompt(*texts) == (found["prompt"], found["chosen"], found["rejected"])


def test_text_and_messages_may_meet_as_they_do_in_fine_tuning(tmp_path):
    expected = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    assert read(tmp_path, {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}) == [expected]
    assert read(tmp_path, {"prompt": [USER], "chosen": "g", "rejected": "b"}) == [expected]


def test_an_answer_that_ends_with_a_space_is_not_its_own_prompt():
    # TRL looks at the character before the first, which Python takes for the last.
    assert preference.extract_prompt("x ", "y ") == ("", "x ", "y ")


def test_rankings_become_every_pair_with_its_margin(tmp_path):
    ranking = {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1, 3.5, 1, 0], "id": 1}
    found = [(r["chosen"], r["rejected"], r["margin"]) for r in read(tmp_path, ranking)]
    assert found == [("a", "d", 1), ("b", "a", 2.5), ("b", "c", 2.5), ("b", "d", 3.5), ("c", "d", 1)]
    answers = [[GOOD, USER, BAD], [GOOD, USER, GOOD]]
    assert read(tmp_path, {"prompt": "q", "completions": answers, "scores": [0.0, 0.5]}) == [
        {"prompt": [USER], "chosen": answers[1], "rejected": answers[0], "margin": 0.5},
    ]
    ranked = {"prompt": [USER], "completions": ["a", "b"], "ranks": [2, 1]}
    answers = [[{"role": "assistant", "content": text}] for text in "ba"]
    assert read(tmp_path, ranked) == [
        {"prompt": [USER], "chosen": answers[0], "rejected": answers[1], "margin": 1},
    ]


@pytest.mark.parametrize("prompt", [{"prompt": "p"}, {}])
def test_pairs_become_unpaired_in_trls_order(tmp_path, monkeypatch, prompt):
    monkeypatch.setattr(preference, "_UNPAIRING_BLOCK", 2)
    pairs = [{**prompt, "chosen": f"p{i} a", "rejected": f"p{i} b", "n": i} for i in range(5)]
    extracted = datasets.Dataset.from_list([maybe_extract_prompt(pair) | {"n": pair["n"]} for pair in pairs])
    expected = trl.data_utils.unpair_preference_dataset(extracted, batch_size=2)
    assert read(tmp_path, *pairs, kind="unpaired") == expected.to_list()


def test_unpaired_records_and_what_they_keep(tmp_path):
    records = [
        {"prompt": "p", "completion": "c", "label": True, "id": 1},
        {"prompt": [USER], "completion": [GOOD], "label": False},
        {"prompt": "q", "completion": [GOOD], "label": False, "margin": None},
    ]
    assert read(tmp_path, *records, kind="unpaired") == [records[0], records[1], records[1]]


def test_numbers_and_what_the_template_needs_are_kept(tmp_path):
    tool = {"type": "function", "function": {"name": "f"}}
    record = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "margin": 2, "ref_chosen_logps": -1.5}
    record |= {"ref_rejected_logps": -2.0, "tools": [tool], "chat_template_kwargs": {"thinking": False}}
    assert read(tmp_path, record) == [record]
    assert read(tmp_path, {**record, "tools": json.dumps([tool])}) == [record]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream", "folder"])
def test_tables_give_the_records_of_jsonl(tmp_path, kind):
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    records = [
        {"prompt": [USER], "chosen": [call], "rejected": [BAD], "id": 2, "tools": "[]"},
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD], "id": 1},
    ]
    path = tmp_path / f"data.{'parquet' if kind == 'parquet' else 'arrow'}"
    table = pyarrow.Table.from_pylist(records)  # with the first one's columns: the second has nulls
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "folder":
        datasets.Dataset(table).save_to_disk(path := tmp_path / "folder")
    else:
        new = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
        with new(path, table.schema) as file:
            file.write_table(table)
    assert read_preferences(path, "pairs") == read(tmp_path, *records)


def test_tables_name_their_rows_and_what_they_are_not(tmp_path):
    data = datasets.Dataset.from_list([{"chosen": "a", "rejected": text} for text in "bab"])
    data.save_to_disk(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"folder:2: found chosen and rejected equal"):
        read_preferences(tmp_path / "folder", "pairs")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "splits")
    with pytest.raises(FileNotFoundError, match=r"splits: found a folder of several splits \(give one of them\)"):
        read_preferences(tmp_path / "splits", "pairs")
    for suffix in ("parquet", "arrow"):
        write(tmp_path, "{}").rename(tmp_path / f"data.{suffix}")
        with pytest.raises(ValueError, match=rf"data.{suffix}: not a file of the kind that its name says"):
            read_preferences(tmp_path / f"data.{suffix}", "pairs")


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
RANKING = {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{no", "expected one line of JSON"),
        ([], "found a list, expected an object with"),
        ({"prompt": "p"}, "found the fields ['prompt'] without chosen and rejected"),
        ({"chosen": "a"}, "found the fields ['chosen'] without rejected, expected"),
        ({**PAIR, "prompt": 3}, "prompt: found a number, expected text or a list of messages"),
        ({**PAIR, "chosen": None}, "chosen: found null, expected text or a list of messages"),
        ({**PAIR, "chosen": "b"}, "found chosen and rejected equal, expected two different answers"),
        ({**PAIR, "rejected": ""}, "rejected: found empty text, expected an answer"),
        ({**PAIR, "rejected": [BAD]}, "found text as chosen and a list as rejected, expected both alike"),
        ({**CHAT, "chosen": []}, "chosen: found an empty list, expected a list of messages"),
        ({**CHAT, "chosen": [USER]}, "chosen: found no assistant message, expected at least one"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "found no message that chosen and rejected share"),
        ({**PAIR, "margin": "2"}, "margin: found text, expected a number"),
        ({**PAIR, "margin": True}, "margin: found true or false, expected a number"),
        ({**PAIR, "margin": float("nan")}, "margin: found nan, expected a finite number"),
        ({**PAIR, "margin": 10**40}, f"margin: found {10**40}, expected a finite number"),
        ({**PAIR, "margin": 1}, "found the numbers margin, expected none, as in the first record"),
        ({**PAIR, "ref_chosen_logps": -1}, "found one of ref_chosen_logps and ref_rejected_logps, expected both"),
        ({**PAIR, "tools": [{}]}, "tools: found it beside plain text, expected messages"),
        ({**CHAT, "tools": {}}, "tools: found an object, expected a list"),
        ({**CHAT, "tools": "[{"}, "tools: found '[{', expected a list of tools as JSON ("),
        ({**CHAT, "chat_template_kwargs": 1}, "chat_template_kwargs: found a number, expected an object"),
        ({"completions": ["a", "b"], "scores": [1, 2]}, "without prompt"),
        ({**RANKING, "scores": [1]}, "found 2 completions and 1 score, expected as many of each"),
        ({**RANKING, "scores": [1, 1]}, "scores: found 1 different value, expected at least 2"),
        ({**RANKING, "scores": [1, float("inf")]}, "scores[1]: found inf, expected a finite number"),
        ({**RANKING, "prompt": 1}, "prompt: found a number, expected text or a list of messages"),
        ({**RANKING, "margin": 1}, "margin: found it beside completions, expected it with pairs only"),
        ({**RANKING, "scores": None}, "found a list as completions and null as scores"),
        ({**RANKING, "completions": ["a", ""]}, "completions[1]: found empty text"),
        ({**RANKING, "completions": ["a", "a"]}, "completions[1] over completions[0]: found chosen and rejected equal"),
        ({"prompt": "p", "completion": "c", "label": True}, 'found unpaired data, which algorithm="kto" learns from'),
    ],
)
def test_a_bad_pair_is_named_with_what_was_found_and_expected(tmp_path, record, words):
    assert words in fault(tmp_path, record)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "p", "completion": "c"}, "found the fields ['completion', 'prompt'] without label, expected"),
        ({"prompt": "p", "completion": "c", "label": 1}, "label: found a number, expected true or false"),
        ({"prompt": "p", "completion": "", "label": True}, "completion: found empty text"),
        ({**PAIR, "chosen": "b"}, "found chosen and rejected equal"),
        (RANKING, "found rankings (completions), expected an object with"),
    ],
)
def test_a_bad_unpaired_record_is_named(tmp_path, record, words):
    assert words in fault(tmp_path, record, kind="unpaired")


def test_all_bad_lines_and_all_faults_of_a_line_are_in_one_message(tmp_path):
    bad = {"prompt": 1, "chosen": 2, "rejected": "b", "margin": "x"}
    with pytest.raises(ValueError) as error:
        read(tmp_path, bad, PAIR, "{", "", {"prompt": "p"})
    assert [line.split(":")[1] for line in str(error.value).splitlines()[1:]] == ["1", "1", "1", "3", "5"]


HH = "\n\nHuman: hi there\n\nAssistant:"


@pytest.mark.parametrize(
    "beside",
    [
        {"question": "hi there"},
        {"instruction": "hi there", "input": ""},
        {"query": "hi  there"},
        {"messages": [{"role": "user", "content": "hi there"}]},
        {"prompt": "hi there"},
        {"question": "the first of the day"},
    ],
)
def test_a_transcript_that_two_texts_begin_with_is_the_prompt_beside_its_question(tmp_path, beside):
    path = write(tmp_path, {"chosen": f"{HH} Two.", "rejected": f"{HH} Five.", **beside})
    [record] = read_preferences(path, "pairs", note=lambda message: None)
    assert (record["prompt"], record["chosen"], record["rejected"]) == (HH, " Two.", " Five.")


def test_answers_that_begin_alike_do_not_take_the_place_of_their_question(tmp_path):
    [record] = read(tmp_path, {"chosen": "It is four.", "rejected": "It is five.", "question": "What is it?"})
    assert record["prompt"] == [{"role": "user", "content": "What is it?"}]
    assert record["chosen"] == [{"role": "assistant", "content": "It is four."}]


@pytest.mark.parametrize(
    "beside",
    [
        {"source": "made by hand"},
        {"id": "x y"},
        {"subset": "a b", "created_at": "2024-01-01 10:00:00", "chosen_model": "gpt 4"},
        {"part": "sky is"},
    ],
)
def test_what_tells_of_a_row_does_not_ask(tmp_path, beside):
    pair = {"chosen": "The sky is blue.", "rejected": "The sky is green.", **beside}
    for record in read(tmp_path, pair) + read(tmp_path, pair, kind="unpaired"):
        assert record["prompt"] == "The sky is"


@pytest.mark.parametrize(
    "start",
    ["Q: Two and two?\nA:", "### Instruction:\nAdd.\n\n### Response:\n", "<|user|>\nAdd.\n<|assistant|>\n", HH],
)
def test_a_dialogue_is_a_prompt_whatever_stands_beside_it(tmp_path, start):
    row = {"chosen": f"{start}Four", "rejected": f"{start}Two", "post": "some other words"}
    assert read(tmp_path, row)[0]["prompt"] == start


def test_a_line_that_two_answers_share_is_not_a_prompt_beside_other_text(tmp_path):
    row = {"chosen": "Sure!\n\nFour", "rejected": "Sure!\n\nFive"}
    assert read(tmp_path, row)[0]["prompt"] == "Sure!\n\nF"
    assert "begin with and post beside them" in fault(tmp_path, {"post": "What is two plus two?", **row})


CALL = {"role": "assistant", "tool_calls": [{"name": "f"}]}
RESULT = {"role": "tool", "content": "r"}


@pytest.mark.parametrize("prompt", [{"prompt": "q"}, {"prompt": [USER]}, {"question": "q"}, {"messages": [USER]}])
@pytest.mark.parametrize("shared", [[], [SYSTEM], [USER], [SYSTEM, USER]])
def test_a_question_and_what_two_conversations_share_make_one_prompt(tmp_path, prompt, shared):
    [record] = read(tmp_path, {**prompt, "chosen": [*shared, GOOD], "rejected": [*shared, BAD]})
    expected = [SYSTEM, USER] if SYSTEM in shared else [USER]
    assert (record["prompt"], record["chosen"], record["rejected"]) == (expected, [GOOD], [BAD])


def test_a_question_stands_before_the_turns_that_two_answers_share(tmp_path):
    row = {"prompt": "q", "chosen": [CALL, RESULT, GOOD], "rejected": [CALL, RESULT, BAD]}
    assert read(tmp_path, row)[0]["prompt"] == [USER, CALL, RESULT]


def test_a_prompt_that_both_answers_repeat_is_written_once(tmp_path):
    turns = [SYSTEM, USER, GOOD, {"role": "user", "content": "more"}]
    for repeated in (turns, turns[-1:], turns[:1]):
        row = {"prompt": turns, "chosen": [*repeated, GOOD], "rejected": [*repeated, BAD]}
        assert read(tmp_path, row) == [{"prompt": turns, "chosen": [GOOD], "rejected": [BAD]}]
    text = {"prompt": "Two and two is", "chosen": "Two and two is four", "rejected": "Two and two is five"}
    assert read(tmp_path, text) == [{"prompt": "Two and two is", "chosen": " four", "rejected": " five"}]
    kept = {"prompt": "A", "chosen": "A cat", "rejected": "A dog"}
    assert read(tmp_path, kept) == [kept]
