"""`jlora data`: each form is named, trained tokens are marked, what is left out has its reason."""

import csv
import json
import re

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jlora.cli.main import main
from jlora.data import Example, Item, flat, plan, shown
from jlora.data.shown import histogram, pieces

QUESTION, ANSWER = "What is 1 + 2?", "It is 3."
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
TURNS = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
ALPACA = {"instruction": "What is it?", "input": "1 + 2", "output": ANSWER}


def as_csv(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def as_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_zstd(path, rows):
    path.write_bytes(pyarrow.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), "zstd", asbytes=True))


FORMS = {
    "chat.jsonl": ("sft", as_lines, {"messages": CHAT}, "chats (messages)"),
    "sharegpt.json": (
        "sft",
        lambda path, rows: path.write_text(json.dumps(rows)),
        {"conversations": TURNS, "system": "Be exact."},
        "ShareGPT (conversations)",
    ),
    "alpaca.csv": ("sft", as_csv, ALPACA, "Alpaca (instruction, input, output)"),
    "alpaca.jsonl.zst": ("sft", as_zstd, ALPACA, "Alpaca (instruction, input, output)"),
    "qa.parquet": (
        "sft",
        lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
        {"question": QUESTION, "answer": ANSWER},
        "questions and answers (question, answer)",
    ),
    "folder": (
        "sft",
        lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
        {"prompt": QUESTION, "completion": ANSWER},
        "prompts and completions (prompt, completion)",
    ),
    "book.txt": ("sft", lambda path, rows: path.write_text(rows[0]["text"]), {"text": ANSWER}, "texts (text)"),
    "pairs.jsonl": (
        "dpo",
        as_lines,
        {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "It is 4."}},
        "pairs (conversations, chosen, rejected)",
    ),
    "judged.jsonl": (
        "kto",
        as_lines,
        {"prompt": QUESTION, "completion": ANSWER, "label": True},
        "judged answers (prompt, label, completion)",
    ),
}


@pytest.fixture
def data(recipe, capsys):
    """(options) → (exit code, what was printed, what was said of errors)."""

    def run(path, *options):
        code = main(
            ["data", f"--config={recipe}", f"--config.data.path={path}", "--config.train.seq_len=128", *options]
        )
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_named_and_its_answer_is_what_is_trained(data, tmp_path, name):
    algorithm, write, row, words = FORMS[name]
    write(tmp_path / name, [row] * 2)
    code, printed, _ = data(tmp_path / name, f"--config.algorithm={algorithm}", "--show=1")
    assert code == 0
    count = "1 record" if name == "book.txt" else "2 records"
    assert f"{tmp_path / name}: {count}, read as {words}" in printed
    trained = re.findall(r"«(.*?)»", "".join(printed.split("example 1")[1:]).replace("\n", ""))
    assert trained[0].startswith(ANSWER)
    if algorithm == "dpo":
        assert [text.partition("<|end|>")[0] for text in trained] == [ANSWER, "It is 4."]
    assert re.search(r"row   1 ░*█+", printed)


def test_what_is_left_out_is_listed_with_its_reason(data, tmp_path):
    rows = [{"messages": CHAT}, {"prompt": "q", "completion": "long " * 99}, {"none": 1}, {"none": 2}]
    as_lines(path := tmp_path / "a.jsonl", rows)
    code, printed, _ = data(path, "--config.data.on_error=skip", "--json")
    found = json.loads(printed)
    assert code == 0
    assert found["examples"] == 1 and found["trained_tokens"] == len(ANSWER) + 1
    assert {(one["reason"].split(":")[0][:22], one["count"], *one["places"]) for one in found["left_out"]} == {
        ("found the fields ['non", 2, f"{path}:3", f"{path}:4"),
        ("longer than train.seq_", 1, f"{path}:2"),
    }
    assert sum(one["count"] for one in found["histogram"]) == 1
    code, printed, _ = data(path, "--config.data.on_error=skip")
    assert "left out" in printed and "longer than train.seq_len: 497 tokens" in printed


def test_bad_rows_and_tasks_are_a_users_mistake(data, tmp_path):
    as_lines(path := tmp_path / "a.jsonl", [{"none": 1}])
    code, _, said = data(path)
    assert code == 2
    assert "the first is none=1 (data.columns says which columns to read)" in said


def test_tokens_that_share_a_character_are_shown_together(byte_tokenizer):
    text = "é🙂\nx"
    ids = byte_tokenizer(text)["input_ids"]
    example = Example(np.array([*ids, 0], np.int32), np.arange(len(ids) + 1) > 1)
    found = list(pieces(example, byte_tokenizer))
    assert [piece.text for piece in found] == ["é", "🙂", "\n", "x", "<|end|>"]
    assert [piece.special for piece in found] == [False] * 4 + [True]
    assert shown.marked(example, byte_tokenizer, colours=False).plain == "é«🙂⏎\nx<|end|>»"
    broken = Example(np.array(ids[:1], np.int32), np.array([True]))
    assert [piece.text for piece in pieces(broken, byte_tokenizer)] == ["\ufffd"]


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [7, 900, 33, 34], list(range(1, 4000))])
def test_a_histogram_counts_every_length_once(lengths):
    found = histogram(np.array(lengths))
    assert sum(count for *_, count in found) == len(lengths)
    assert len(found) <= shown.BARS + 1
    assert all(least <= end for least, end, _ in found)
    assert found[0][0] <= min(lengths) and max(lengths) <= found[-1][1]


def test_padding_and_rows_are_those_of_the_plan():
    items = flat([Item((Example(np.zeros(n, np.int32), np.ones(n, np.bool_)),)) for n in (10, 20, 30)])
    steps = plan(items.lengths.ravel(), seq_len=32, batch_size=2, packing=True, bucket=32, epochs=1)
    assert shown.padding(steps, items) == pytest.approx(1 - 60 / 64)
    lines = [line.plain for step in steps for line in shown.pictured(step, items.examples)]
    assert len(lines) == 2
    assert {line.split("·")[-1].split("█")[-1].strip() for line in lines} == {
        "30 of 32 tokens, 2 documents",
        "30 of 32 tokens, 1 document",
    }
