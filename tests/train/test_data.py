"""Whatever the algorithm, data is read by one mechanism: bad rows end the run before it begins, or are left out."""

import contextlib
import gzip
import itertools
import json
import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from jlora.data import Item, LeftOut, Notes, filled, flat
from jlora.errors import UserError
from jlora.train.algorithms import ALGORITHMS
from jlora.train.algorithms.prompts import Prompts
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


@pytest.mark.parametrize("algorithm", ["sft", "kto", "grpo"])
def test_who_watches_is_told_how_much_of_the_files_is_encoded(planned, tmp_path, algorithm):
    told = []

    @contextlib.contextmanager
    def counting(what):
        told.append((what, []))
        yield lambda done, share: told[-1][1].append((done, share))

    for name in ("a", "b"):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            rows = ({**ROW, "input": f"{name}{number}", "id": random.randbytes(1500).hex()} for number in range(120))
            file.writelines(json.dumps(row) + "\n" for row in rows)
    paths = [str(tmp_path / f"{name}.jsonl.gz") for name in ("a", "b")]
    planned(algorithm, {"path": tuple(paths), "eval_path": paths[0]}, counting=counting)
    records = 240 * (2 if algorithm == "kto" else 1)
    for (what, shares), path, count in zip(told, (", ".join(paths), paths[0]), (records, records // 2), strict=True):
        assert what.endswith(f" of {path}")
        assert [done for done, _ in shares] == list(range(1, len(shares) + 1))
        assert len(shares) == (min(count, 64) if algorithm == "grpo" and path == paths[0] else count)
        known = [share for _, share in shares if share]
        assert known == sorted(known) and known[-1] == 1
        assert known[0] < 0.6 or algorithm == "kto"  # whose pairs are read by the thousand


def rows_of(name, count):
    return [{**ROW, "instruction": f"Add for {name} {number}.", "topic": name} for number in range(count)]


@pytest.fixture
def planned(model_folder, tokenizer, tmp_path):
    """(algorithm, data settings, train settings) → the plan, and what was told."""

    def make(algorithm, given, counting=None, **train):
        (tmp_path / "rewards.py").write_text("def one(completions, **columns):\n    return [1.0] * len(completions)\n")
        rollout = {"rewards": (f"{tmp_path / 'rewards.py'}:one",), "num_generations": 2, "max_completion_length": 8}
        values = {"algorithm": algorithm, "model": {"path": str(model_folder)}, "data": {"cache": None} | given}
        values |= {"train": {"steps": 12, "batch_size": 2, "seq_len": 128} | train}
        values |= {"rollout": rollout} if algorithm in ("grpo", "ppo") else {}
        heard, left_out = [], LeftOut()
        notes = Notes(heard.append, heard.append, left_out, counting)
        return ALGORITHMS[algorithm].plan(resolve(values), tokenizer, notes), heard, left_out

    return make


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_mixture_is_read_by_every_algorithm_and_each_source_has_its_share(planned, tmp_path, algorithm):
    for name, count in (("small", 2), ("large", 9)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(name, count)))
    sources = {
        "small": {"path": str(tmp_path / "small.jsonl"), "weight": 3.0},
        "large": {"path": str(tmp_path / "l*.jsonl"), "weight": 1.0, "limit": 6},
    }
    plan, heard, _ = planned(algorithm, {"sources": sources})
    report = plan.encoded.report
    paired = 2 if algorithm == "kto" else 1
    assert report.sources == (2 * paired, 6 * paired)
    for name, count in (("small", 2), ("large", 6)):
        line = next(line for line in heard if line.startswith(f"{name} ({tmp_path}"))
        assert f": {count} records, read as " in line
        assert line.endswith("topic")
    if plan.encoded.steps:
        sides = plan.encoded.items.sides
        taken = [index // sides for step in plan.encoded.steps for row in step.rows for index in row]
        small = sum(item < report.sources[0] for item in taken) / len(taken)
        assert 0.6 < small < 0.9


def test_prompts_of_a_mixture_are_drawn_by_their_weights():
    items = flat([Item((filled(3),))] * 12)
    prompts = Prompts(items, [{"prompt": "q"}] * 12, counts=(2, 10), weights=(3.0, 1.0))
    drawn = prompts.order(0, 0, 48)
    assert prompts.order(0, 20, 28) == drawn[20:]
    times = np.bincount(drawn, minlength=12)
    assert times[:2].sum() == 36 and set(times[:2]) == {18}
    assert set(times[2:]) <= {1, 2}


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "kto", "grpo"])
def test_a_share_of_the_records_is_held_out_of_every_algorithm(planned, tmp_path, algorithm):
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows_of("all", 20), 3]))
    settings = {"path": str(tmp_path / "all.jsonl"), "eval_share": 0.3, "on_error": "skip"}
    _, heard, left_out = planned(algorithm, settings, eval_every=1)
    counts = [int(line.split(": ")[1].split()[0]) for line in heard if "records, read as" in line]
    assert len(counts) == 2 and all(counts)
    assert sum(counts) == 20
    assert sum(line.startswith(f"{tmp_path / 'all.jsonl'}, held out: ") for line in heard) == 1
    assert len(left_out) == 1 and sum("cannot be used" in line for line in heard) == 1


def test_a_source_of_which_nothing_is_left_is_named(planned, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "q", "completion": "word " * 100}) + "\n")
    (tmp_path / "short.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    sources = {name: {"path": str(tmp_path / f"{name}.jsonl"), "weight": 1.0} for name in ("short", "long")}
    with pytest.raises(UserError, match=r"data.sources: nothing is left to train on of long: "):
        planned("sft", {"sources": sources})


def test_each_source_says_whether_its_prompts_are_trained(planned, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "qqqq", "completion": "a"}) + "\n")
    own = {"path": str(tmp_path / "a.jsonl")}
    plan, _, _ = planned("sft", {"sources": {"one": own, "two": own | {"completion_only": False}}})
    first, second = (item.documents[0] for item in plan.encoded.items)
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.trained.sum() == 2 and second.trained.all()


@pytest.mark.parametrize("overlap", [1, 0, 40])
def test_a_long_text_is_read_in_windows_and_each_token_trained_once(planned, tmp_path, overlap):
    text = "".join(map(chr, range(33, 127))) * 5
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}) + "\n")
    plan, _, _ = planned("sft", {"path": str(tmp_path / "a.jsonl"), "window_overlap": overlap})
    *windows, last = (item.documents[0] for item in plan.encoded.items)
    assert len(last.tokens) == len("short") + 1
    assert max(len(window.tokens) for window in windows) == 128
    assert plan.encoded.report.kept[-1] == 1 and set(plan.encoded.report.kept[:-1]) == {0}
    whole = windows[0].tokens.tolist()
    for before, window in itertools.pairwise(windows):
        assert before.tokens[len(before.tokens) - overlap :].tolist() == window.tokens[:overlap].tolist()
        assert not window.trained[:overlap].any() and window.trained[overlap:].all()
        whole += window.tokens[overlap:].tolist()
    assert len(whole) == len(text) + 1  # the end of the text
    counted = sum(int(window.trained[1:].sum()) for window in windows)
    assert counted == len(whole) - (len(windows) if overlap == 0 else 1)


def test_records_that_are_left_out_are_told_with_their_places(planned, tmp_path):
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "word " * 100}, {"none": 1}]
    rows += [{"messages": [{"role": "assistant", "content": "a", "train": False}]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"path": str(path), "on_error": "skip"}
    _, _, left_out = planned("sft", settings)
    left_out.write(tmp_path)
    found = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert {one["place"]: one["reason"].split(":")[0][:24] for one in found} == {
        f"{path}:2": "longer than train.seq_le",
        f"{path}:3": "found the fields ['none'",
        f"{path}:4": "no trained token within ",
    }
    assert left_out.describe().startswith("left out: 3 records, listed in left_out.jsonl (1: ")
    # From the cache the same is told.
    big = {"prompt": "q", "completion": "a", "other": "x" * 2**20}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, big]))
    told = [planned("sft", settings | {"cache": str(tmp_path / "cache")})[1:] for _ in range(2)]
    assert told[0][1].reasons == told[1][1].reasons
    assert [line for line in told[1][0] if "the tokens come from" not in line] == told[0][0] != told[1][0]
