"""Sources: every form is found and said, can be forced and mapped; shares are held out by question."""

import json

import pytest

from jlora.data import Source, Sources, read_preferences, read_prompts, read_records
from jlora.data.notes import Notes
from jlora.errors import UserError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def write(folder, *rows, name="a.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told(reader, where, **settings):
    """What is told of the data, and the records."""
    heard = []

    def refuse(message):
        raise AssertionError(message)

    records = reader(where, note=Notes(refuse, heard.append), **settings)
    return heard, records


def pairs(where, **settings):
    return read_preferences(where, "pairs", **settings)


def judged(where, **settings):
    return read_preferences(where, "unpaired", **settings)


@pytest.mark.parametrize(
    ("reader", "row", "words"),
    [
        (read_records, {"messages": CHAT}, "chats (messages)"),
        (read_records, {"conversations": TURNS, "system": "s"}, "ShareGPT (conversations)"),
        (read_records, {"conversations": CHAT}, "chats (conversations)"),
        (read_records, {"instruction": "q", "input": "", "output": "a"}, "Alpaca (instruction, output)"),
        (read_records, {"instruction": "q", "context": "c", "output": "a"}, "Alpaca (instruction, context, output)"),
        (read_records, {"question": "q", "answer": "a"}, "questions and answers (question, answer)"),
        (read_records, {"prompt": "q", "completion": "a"}, "prompts and completions (prompt, completion)"),
        (read_records, {"text": "words"}, "texts (text)"),
        (pairs, {"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs (prompt, chosen, rejected)"),
        (pairs, {"conversations": TURNS[:1], "chosen": "a", "rejected": "b"},
          "pairs (conversations, chosen, rejected)"),
        (pairs, {"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, "pairs (question, chosen, rejected)"),
        (pairs, {"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]}, "rankings (prompt, completions, scores)"),
        (judged, {"prompt": "q", "completion": "a", "label": True}, "judged answers (prompt, label, completion)"),
        (read_prompts, {"prompt": "q"}, "prompts (prompt)"),
        (read_prompts, {"question": "q", "answer": "a"}, "prompts (question, answer)"),
    ],
)  # fmt: skip
def test_every_form_is_said_with_what_is_left_of_it(tmp_path, reader, row, words):
    rest = "for the rewards" if reader is read_prompts else "not used"
    path = write(tmp_path, row | {"id": 1}, row | {"topic": "x"})
    heard, records = told(reader, path)
    assert heard == [f"{path}: {len(records)} records, read as {words}; {rest}: id, topic"]


def test_two_forms_in_one_file_are_counted(tmp_path):
    rows = [{"messages": CHAT}, {"text": "words"}, {"messages": CHAT, "text": "words"}]
    path = write(tmp_path, *rows)
    heard, _ = told(read_records, path)
    assert heard == [
        f"{path}: 3 records, read as 2 chats (messages; first {path}:1) and 1 texts (text; first {path}:2); "
        "data.form reads one form alone"
    ]
    texts = Sources({"": Source(str(path), form="text")})
    with pytest.raises(UserError, match=r"a.jsonl:1: found the fields"):
        read_records(texts)
    assert [record["completion"] for record in read_records(texts, on_error="skip", note=str)] == ["words"] * 2


def test_columns_are_read_under_other_names(tmp_path):
    rows = [{"problem": f"q{number}", "solution": "a", "prompt": "p"} for number in range(3)]
    path = write(tmp_path, *rows)
    found = read_records(Sources({"": Source(str(path), columns={"prompt": "problem", "completion": "solution"})}))
    assert found == [{"prompt": f"q{number}", "completion": "a"} for number in range(3)]
    with pytest.raises(UserError) as error:
        read_records(Sources({"": Source(str(path), columns={"prompt": "problm", "completion": "solution"})}))
    assert "no row has the columns 'problm' that data.columns names; the first row is problem='q0'" in str(error.value)


def test_a_cell_is_read_by_the_name_that_it_is_mapped_to(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('talk\n"' + json.dumps(CHAT).replace('"', '""') + '"\n')
    assert read_records(Sources({"": Source(str(path), columns={"messages": "talk"})})) == [{"messages": CHAT}]


@pytest.fixture
def asked(tmp_path):
    """300 answers to 100 questions."""
    rows = [{"prompt": f"question {n % 100}", "completion": f"answer {n}"} for n in range(300)]
    return str(write(tmp_path, *rows))


def test_a_share_is_held_out_by_question(asked, tmp_path):
    both = [read_records(Sources({"": Source(asked)}, 0.2, held_out=side)) for side in (False, True)]
    train, held_out = ({record["prompt"] for record in some} for some in both)
    assert not train & held_out
    assert sum(map(len, both)) == 300
    assert 10 <= len(held_out) <= 30
    # Others come, the order changes: each stays on its side.
    more = [{"prompt": f"new {n}", "completion": "a"} for n in range(50)] + both[0][::-1] + both[1]
    again = read_records(Sources({"": Source(str(write(tmp_path, *more, name="b.jsonl")))}, 0.2, held_out=True))
    assert held_out <= {record["prompt"] for record in again}
    assert not train & {record["prompt"] for record in again}


def test_a_share_of_chats_pairs_and_prompts_is_held_out_alike(tmp_path):
    asked = [[{"role": "user", "content": f"question {n}"}] for n in range(60)]
    answer = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
    chats = write(tmp_path, *({"messages": prompt + answer[0]} for prompt in asked), name="chats.jsonl")
    several = write(
        tmp_path,
        *({"prompt": prompt, "chosen": answer[0], "rejected": answer[1]} for prompt in asked),
        name="pairs.jsonl",
    )
    held_out = [
        {record[key][0]["content"] for record in reader(Sources({"": Source(str(path))}, 0.3, held_out=True))}
        for reader, path, key in (
            (read_records, chats, "messages"),
            (pairs, several, "prompt"),
            (read_prompts, several, "prompt"),
        )
    ]
    assert held_out[0] == held_out[1] == held_out[2]
    assert 0 < len(held_out[0]) < 60


def test_a_source_without_records_is_named(asked):
    with pytest.raises(UserError, match=r"small \(.*\): of 1 record none is held out with data.eval_share=0.001"):
        read_records(Sources({"small": Source(asked, limit=1)}, 0.001, held_out=True))


def test_a_limit_takes_the_first_records_and_reads_no_further(asked):
    with open(asked, "a") as file:
        file.write("not JSON\n")
    assert len(read_records(Sources({"a": Source(asked, limit=7), "b": Source(asked, limit=2)}))) == 9
    with pytest.raises(UserError, match="not JSON"):
        read_records(asked)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": 0.0}, "weight: found 0.0, expected a number above 0"),
        ({"weight": float("inf")}, "weight: found inf"),
        ({"limit": 0}, "limit: found 0, expected a whole number of at least 1"),
        ({"path": ""}, "path: found '', expected the path of a file"),
    ],
)
def test_a_source_that_can_be_none_is_refused(settings, words):
    with pytest.raises(UserError) as error:
        Source(**{"path": "a.jsonl"} | settings)
    assert words in str(error.value)


def test_each_record_left_out_is_told_with_its_reason(tmp_path):
    path = write(tmp_path, {"text": "words"}, {"messages": 1}, {"none": 2})
    found = []
    read_records(path, on_error="skip", note=Notes(str, str, lambda place, reason: found.append((place, reason[:20]))))
    assert found == [(f"{path}:2", "messages: found a nu"), (f"{path}:3", "found the fields ['n")]
