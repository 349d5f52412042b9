"""Metrics of one's own: what they are given, what they may return, and the numbers that come of it in a run."""

import json
import math

import numpy as np
import pytest

from jlora import data, hub, lora
from jlora.errors import UserError
from jlora.generate import generate
from jlora.train import resolve, run
from jlora.train.algorithms.algorithm import Plan
from jlora.train.evaluation.metrics import Generated, MetricFailed, join, load, load_metrics, measured, scored
from jlora.train.reporting.metrics import read_metrics
from jlora.train.restore import load_run

MESSAGES = [{"role": "user", "content": "one?"}]
GENERATED = Generated(
    records=[{"prompt": "a ", "completion": "1", "unit": "m"}, {"messages": MESSAGES, "id": 7}],
    prompts=["a ", MESSAGES],
    texts=["1 ", "two"],
    targets=["1", "one"],
)


@pytest.fixture
def metric(tmp_path):
    """metric(body, parameters): the metric of a file with f(parameters)."""

    def make(body, parameters="texts"):
        (tmp_path / "mine.py").write_text(f"import numpy as np\n\ndef f({parameters}):\n    {body}\n")
        return load_metrics([f"{tmp_path}/mine.py:f"])[0]

    return make


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        ("return 3", {"f": 3.0}),
        ("return [1, 0]", {"f": 0.5}),
        ("return [None, True]", {"f": 1.0}),
        ("return np.array([0.5, 1.0], np.float32)", {"f": 0.75}),
        ("return np.float32(0.25)", {"f": 0.25}),
        ("return np.array(2)", {"f": 2.0}),
        ("return {'f1': 0.5, 'hits': [1, 1]}", {"f1": 0.5, "hits": 1.0}),
    ],
)
def test_a_number_or_one_a_text_or_several_by_name(metric, body, numbers):
    assert metric(body)(GENERATED) == numbers


def test_arrays_of_jax_are_numbers_and_nothing_known_is_no_number(metric):
    assert math.isnan(metric("return [None, None]")(GENERATED)["f"])
    assert metric("import jax.numpy as jnp\n    return jnp.array([1.0, 2.0])")(GENERATED) == {"f": 1.5}


@pytest.mark.parametrize("returned", ["'good'", "[1]", "['1', 2]", "{'a': {}}", "np.eye(2)"])
def test_anything_else_is_refused_with_what_was_returned(metric, returned):
    with pytest.raises(UserError, match="expected a number, a list of one number or None for each of 2 texts, or"):
        metric(f"return {returned}")(GENERATED)


def test_a_function_takes_what_it_names(metric):
    body = "return {'n': len(texts), 'unit': float(unit == ['m', None]), 'id': float(rest['id'] == [None, 7])"
    body += ", 'chat': float(completions == ['1 ', [{'role': 'assistant', 'content': 'two'}]])"
    body += ", 'same': float(records[0]['completion'] == targets[0])}"
    found = metric(body, "texts, targets, records, completions, unit, **rest")(GENERATED)
    assert found == {"n": 2.0, "unit": 1.0, "id": 1.0, "chat": 1.0, "same": 1.0}
    assert metric("return 1", "texts, unit, other=3").faults(["unit"]) == []
    (fault,) = metric("return 1", "texts, answer").faults(["unit"])
    assert "wants ['answer'], expected parameters among texts, targets, prompts, completions, records, unit" in fault


def test_a_file_as_for_jlora_eval_and_the_exact_match(tmp_path):
    (tmp_path / "mine.py").write_text("def metric(record, text):\n    return {'short': len(text) < 4, 'x': 1.5}\n")
    metrics = load_metrics([f"{tmp_path}/mine.py", "exact_match"])
    assert join({"loss": 1.0}, metrics, GENERATED) == {"loss": 1.0, "short": 1.0, "x": 1.5, "exact_match": 0.5}


def test_all_that_fails_is_said_with_its_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def metric(record, text):\n    return {'loss': 1.0}\n\ndef f(texts):\n    return texts[9]\n\n"
        "def loss(texts):\n    return 1\n"
    )
    path = tmp_path / "mine.py"
    with pytest.raises(UserError) as error:
        join({"loss": 1.0}, load_metrics([str(path), f"{path}:f", f"{path}:loss"]), GENERATED)
    for part in ("mine.py: the name 'loss' is taken", "mine.py, line 5: IndexError", ":loss: the name 'loss' is taken"):
        assert part in str(error.value)


def test_what_cannot_be_loaded_is_said_at_once(tmp_path):
    (tmp_path / "a.py").write_text("def f(texts):\n    return 1\n")
    (tmp_path / "b.py").write_text("def f(texts):\n    return 1\n")
    names = ["bleu", f"{tmp_path}/none.py:f", f"{tmp_path}/a.py:g", f"{tmp_path}/a.py:f", f"{tmp_path}/b.py:f"]
    with pytest.raises(UserError) as error:
        load_metrics(names)
    for part in ("found 'bleu', expected exact_match, FILE.py:FUNCTION", "none.py is not a file", "no function g()"):
        assert part in str(error.value)
    assert "two are called f; rename one" in str(error.value)


ANSWERS = [
    {"id": 7, "prompt": "a ", "target": "1", "text": "1 ", "exact_match": 1.0},
    {"prompt": "b ", "target": "2", "text": "two", "exact_match": 0.0},
]
RECORDS = [{"id": 7, "prompt": "a ", "completion": "1"}, {"prompt": "b ", "completion": "2"}]


def test_answers_are_scored_one_by_one_and_averaged(tmp_path):
    """A metric of each record or of all texts: what it says of an answer, and the mean, beside what is known."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def metric(record, text):\n    return {'length': len(text)} | ({'known': 1.0} if 'id' in record else {})\n\n"
        "def f(texts, id):\n    return {'length': [len(text) for text in texts], 'known': [n and 1 for n in id]}\n"
    )
    for name in (str(path), f"{path}:f"):
        numbers, answers = scored(load(name), RECORDS, {"loss": 1.0}, ANSWERS)
        assert numbers == {"loss": 1.0, "length": 2.5, "known": 1.0}
        assert answers == [ANSWERS[0] | {"length": 2.0, "known": 1.0}, ANSWERS[1] | {"length": 3.0}]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("0.5", "record 1, record 2: metric(record, text): found 0.5, expected a dict of numbers"),
        ("{'a': 'b'}", "expected a dict"),
        ("{'loss': 1.0}", "returned the names ['loss'], expected names other than"),
        (
            "{'id': 1.0, 'prompt': 1, 'target': 1, 'text': 1, 'scale': 1}",
            "['id', 'prompt', 'scale', 'target', 'text']",
        ),
    ],
)
def test_what_a_metric_of_each_record_may_not_return(tmp_path, found, words):
    (tmp_path / "mine.py").write_text(f"def metric(record, text):\n    return {found}\n")
    with pytest.raises(MetricFailed) as error:
        scored(load(str(tmp_path / "mine.py")), RECORDS, {"loss": 1.0}, ANSWERS)
    assert words in str(error.value)
    assert (error.value.numbers, error.value.answers) == ({"loss": 1.0}, ANSWERS)


def test_the_function_of_a_file_is_found_or_what_is_there_is_said(tmp_path):
    (tmp_path / "good.py").write_text("def metric(record, text):\n    return {'right': float(record['x'] == text)}\n")
    assert load(f"{tmp_path}/good.py").function({"x": "y"}, "y") == {"right": 1.0}
    with pytest.raises(
        FileNotFoundError, match=r"gone.py is not a file; expected a Python file that defines metric\(\)"
    ):
        load(f"{tmp_path}/gone.py")
    (tmp_path / "other.py").write_text("from math import sqrt\n\n\ndef score(record, text):\n    return {}\n")
    with pytest.raises(ValueError, match=r"other.py defines no function metric\(\); it defines score$"):
        load(f"{tmp_path}/other.py")
    (tmp_path / "broken.py").write_text("\ndef metric(:\n")
    with pytest.raises(ValueError, match=r"broken.py, line 2: SyntaxError"):
        load(f"{tmp_path}/broken.py")
    (tmp_path / "empty.py").write_text("{}\n")
    with pytest.raises(ValueError, match=r"empty.py defines no function metric\(\); it defines none at all"):
        load(f"{tmp_path}/empty.py")


def test_records_without_prompts_are_refused_before_anything_is_loaded():
    train = {"steps": 1, "eval_every": 1, "metrics": ["exact_match"]}
    config = resolve({"model": {"path": "m"}, "data": {"path": "d", "eval_path": "d"}, "train": train})
    records = [{"prompt": "", "completion": "a text"}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match="1 of 2 held-out records have no prompt to write a text for"):
        measured(lambda *_: Plan(1, print, held_out=records))(config, None, print)


@pytest.fixture(scope="module")
def model_folder(make_llama):
    return make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("algorithm", [pytest.param("dpo", marks=pytest.mark.slow), "several"])
def test_a_run_measures_the_texts_that_generate_gives_for_its_adapter(model_folder, tmp_path, algorithm):
    records = [{"prompt": f"{i} is ", "chosen": f"{i}.", "rejected": "no"} for i in range(6)]
    if algorithm != "dpo":
        records = [{"prompt": record["prompt"], "completion": record["chosen"]} for record in records]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    seen = tmp_path / "seen.jsonl"
    (tmp_path / "mine.py").write_text(
        "import json\n\ndef size(prompts, texts, targets):\n"
        f"    with open({str(seen)!r}, 'a') as file:\n"
        "        file.write(json.dumps([prompts, texts, targets]) + '\\n')\n    return [len(text) for text in texts]\n"
    )
    settings = {
        "algorithm": "dpo" if algorithm == "dpo" else "sft",
        "model": {"path": model_folder},
        "data": {"path": str(path), "eval_path": str(path)},
        "lora": {"r": 4},
        "optim": {"learning_rate": 0.5},
        "train": {"steps": 2, "batch_size": 4, "seq_len": 32, "eval_every": 2, "metrics": [f"{tmp_path}/mine.py:size"]}
        | {"metric_tokens": 5},
        "mesh": {"fsdp": 4, "tensor": 2} if algorithm == "dpo" else {},
    }
    if algorithm == "several":
        settings["adapters"] = {name: {"train": {"seed": seed}} for seed, name in enumerate(("a", "b"))}
    run(resolve(settings), tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    lines = [json.loads(line) for line in seen.read_text().splitlines()]
    means = [float(np.mean([len(text) for text in texts])) for _, texts, _ in lines]
    if algorithm == "several":
        assert [last["eval_size/a"], last["eval_size/b"]] == means and last["eval_size"] == np.mean(means)
        return
    config, model, params = load_run(tmp_path / "run")
    prompts = [data.split_prompt({"completion": ""} | record)[0] for record in records]
    tokenizer = hub.load_tokenizer(config.model.path)
    texts = generate(model, params, tokenizer, prompts, max_new_tokens=5)
    assert lines == [[prompts, texts, [record.get("chosen", record.get("completion")) for record in records]]]
    assert last["eval_size"] == means[0]
    assert texts != generate(model, lora.strip(params), tokenizer, prompts, max_new_tokens=5)
