"""Whatever the algorithm, data is read by one mechanism: bad rows end the run before it begins, or are left out."""

import json

import pytest
from transformers import AutoTokenizer

from jlora.errors import UserError
from jlora.train.algorithms import ALGORITHMS
from jlora.train.algorithms.files import Told
from jlora.train.config import resolve

ROW = {"instruction": "Add.", "input": "1, 2", "output": "3", "chosen": "3", "rejected": "4", "system": "s"}
REFUSED = "no answer to this"
TEMPLATE = (
    "{% for m in messages %}{% if '" + REFUSED + "' in m.content %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def plan(model_folder, tokenizer, tmp_path):
    """(algorithm, its rows, settings) → what the plan noted."""

    def make(algorithm, rows, held_out=(), **settings):
        for name, some in (("train", rows), ("eval", held_out)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        if held_out:
            settings |= {"eval_path": str(tmp_path / "eval.jsonl")}
        values = {
            "algorithm": algorithm,
            "model": {"path": str(model_folder)},
            "data": {"path": str(tmp_path / "train.jsonl"), **settings},
            "train": {"steps": 1, "batch_size": 2, "seq_len": 128},
        }
        if algorithm in ("grpo", "ppo"):
            (tmp_path / "rewards.py").write_text(
                "def one(completions, **columns):\n    return [1.0] * len(completions)\n"
            )
            rollout = {"rewards": (f"{tmp_path / 'rewards.py'}:one",), "num_generations": 2, "max_completion_length": 8}
            values |= {"rollout": rollout}
        notes = []
        ALGORITHMS[algorithm].plan(resolve(values), tokenizer, notes.append)
        return "\n".join(notes)

    return make


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bad_rows_end_the_run_before_it_begins_or_are_left_out(plan, tmp_path, algorithm):
    bad = {**ROW, "instruction": REFUSED}
    rows = [ROW, 3, ROW, bad, ROW]
    with pytest.raises(UserError, match=r"train.jsonl:2: found a number, expected an object"):
        plan(algorithm, rows)
    with pytest.raises(UserError, match=r"train.jsonl:3: .*refuses"):
        plan(algorithm, [ROW, ROW, bad])
    for held_out in ([ROW, 3], [ROW, bad]):
        with pytest.raises(UserError, match=r"eval.jsonl:2: "):
            plan(algorithm, [ROW, ROW], held_out)
    notes = plan(algorithm, rows, rows, on_error="skip")
    for name in ("train", "eval"):
        assert f"{tmp_path / name}.jsonl: 1 of 5 records cannot be used and are left out" in notes
        assert f"{tmp_path / name}.jsonl:4: " in notes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_second_run_takes_the_tokens_that_the_first_one_kept(plan, tmp_path, algorithm):
    rows = [ROW, {**ROW, "metadata": "x" * 2**20}, 3, {**ROW, "output": "5", "chosen": "5"}]
    settings = {"cache": str(tmp_path / "cache"), "on_error": "skip"}
    first, second = (plan(algorithm, rows, rows[:3], **settings).splitlines() for _ in range(2))
    folders = [line for line in second if "the tokens come from" in line]
    assert len(folders) == len(list((tmp_path / "cache").iterdir())) == 2
    assert [line for line in second if line not in folders] == first
    assert plan(algorithm, rows, rows[:3], cache=None, on_error="skip").splitlines() == first


def test_long_encodings_are_told_about_now_and_then():
    notes, now = [], [0.0]
    told = Told(notes.append, "records encoded", lambda: now[0])
    for done in range(1, 101):
        now[0] = done * 1.0
        told(20 * done)
    assert notes[:2] == ["300 records encoded, 20 a second", "600 records encoded, 20 a second"]
    assert len(notes) == 6
