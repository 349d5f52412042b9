"""Rewards are called as TRL calls them, and every way in which one can fail is named."""

import asyncio
import functools
import json
import math
import pathlib
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.train.rewards.judging import TrainerState, load_rewards, total

CHAT = [{"role": "user", "content": "Sum?"}]
METRIC = pathlib.Path(__file__).parents[3] / "scripts" / "function_calling.py"


def score(functions, prompts=("a", "b"), completions=("x", "yy"), columns=None, **settings):
    ids = [[1] * len(text) for text in completions]
    return load_rewards(functions, **settings)(prompts, completions, ids, columns or {})


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def test_functions_get_what_their_signatures_accept():
    seen = {}

    def everything(**kwargs):
        seen.update(kwargs)
        return [0, 0]

    def some(completions, answer, log_metric, completion_ids=None, unknown=5):
        log_metric("twos", 2)
        log_metric("twos", 4)
        return [len(ids) + unknown for ids in completion_ids]

    class Judge:
        def __call__(self, prompts, log_extra, trainer_state):
            log_extra("side", [trainer_state.global_step, "b"])
            return [None, np.float32(0.5)]

    columns = {"answer": ["1", "2"]}
    rewards = load_rewards([everything, some, Judge(), functools.partial(length, extra=1)])
    table = rewards(("a", "b"), ("x", "yy"), ([1], [1, 1]), columns, trainer_state=TrainerState(2, 9))
    assert set(seen) == {
        "prompts", "completions", "completion_ids", "answer", "trainer_state", "log_metric", "log_extra"
    }  # fmt: skip
    assert (seen["prompts"], seen["completions"], seen["answer"]) == (["a", "b"], ["x", "yy"], ["1", "2"])
    assert table.names == ("everything", "some", "Judge", "length")
    np.testing.assert_array_equal(table.values, np.float32([[0, 6, np.nan, 1], [0, 7, 0.5, 2]]))
    assert (table.metrics, table.extra) == ({"twos": 3.0}, {"side": [2, "b"]})
    assert table.errors == (0, 0, 0, 0) and table.scored.all()


def test_answers_to_messages_are_messages():
    seen = []

    def look(completions):
        seen.extend(completions)
        return [0, 0, 0]

    whole = [{"role": "assistant", "content": "z"}]
    score([look], prompts=(CHAT, "b", CHAT), completions=("x", "y", whole))
    assert seen == [[{"role": "assistant", "content": "x"}], "y", whole]


def test_records_become_prompts_and_columns():
    def right(completions, answer, **others):
        assert set(others) == {"prompts", "completion_ids", "trainer_state", "log_metric", "log_extra"}
        return [None if a is None else float(c == a) for c, a in zip(completions, answer, strict=True)]

    records = [{"prompt": "p", "answer": "x"}, {"prompt": "q"}]
    table = load_rewards([right]).of_records(records, ["x", "y"], [[1], [2]])
    assert table.values[0] == 1 and math.isnan(table.values[1, 0])
    assert table.scored.tolist() == [True, False]
    # Of a rollout whose records all lack what others of the set have.
    assert not load_rewards([right]).of_records(records[1:], ["y"], [[2]], columns=["answer"]).scored.any()


def test_what_is_said_of_completions_can_be_written():
    def says(completions, log_extra):
        log_extra("numbers", np.arange(2, dtype=np.float32))
        log_extra("arrays", [jnp.ones(2), np.bool_(True)])
        log_extra("things", [{1, 2}, object])
        return [1, 2]

    table = load_rewards([says])(["p", "q"], ["a", "b"], [[1], [2]], {})
    assert table.extra == {"numbers": [0, 1], "arrays": [[1, 1], True], "things": ["{1, 2}", str(object)]}
    json.dumps(table.extra)


def test_the_sum_leaves_out_what_is_not_there():
    values = np.array([[1, np.nan], [2, 3], [np.nan, np.nan]], np.float32)
    np.testing.assert_array_equal(total(values, np.array([1, 10], np.float32)), np.float32([1, 32, np.nan]))


def test_numbers_for_the_log():
    def sometimes(completions):
        return [None, 1, 3]

    def never(completions):
        return [None] * 3

    assert score([sometimes, never], "abc", "xyz").numbers() == {
        "rewards/sometimes/mean": 2.0,
        "rewards/sometimes/std": pytest.approx(math.sqrt(2)),
        "rewards/sometimes/errors": 0.0,
        "rewards/never/errors": 0.0,
    }


def test_async_functions_run_together_in_one_loop_that_stays():
    met, loops = [], []

    def pair(value):
        async def judge(completions):
            loops.append(asyncio.get_running_loop())
            met.append(value)
            while len(met) < 2:  # comes to an end only if the other one runs too
                await asyncio.sleep(0)
            return [value] * len(completions)

        return judge

    rewards = load_rewards([pair(1), length, pair(2)])
    call = functools.partial(rewards, ("a", "b"), ("x", "yy"), ([1], [1]), {})
    expected = [[1, 1, 2], [1, 2, 2]]
    assert call().values.tolist() == expected

    async def inside():
        met.clear()
        return call()

    assert asyncio.run(inside()).values.tolist() == expected
    assert len(loops) == 4 and len(set(loops)) == 1


def test_the_loop_ends_with_the_rewards():
    loops = []

    async def judge(completions):
        loops.append(asyncio.get_running_loop())
        return [0, 0]

    rewards = load_rewards([judge])
    rewards(("a", "b"), ("x", "yy"), ([1], [1]), {})
    assert not loops[0].is_closed()
    del rewards
    assert loops[0].is_closed()


def raises(completions):
    return [1.0, {}["gone"]]


async def raises_later(completions):
    await asyncio.sleep(0)
    raise TimeoutError("no answer")


def leaves(completions):
    sys.exit(0)


async def leaves_later(completions):
    await asyncio.sleep(0)
    sys.exit(0)


HERE = re.escape(__file__)
FAILURES = [
    (raises, rf"raises: all 2 completions: {HERE}, line \d+: KeyError: 'gone'", 2),
    (raises_later, rf"raises_later: all 2 completions: {HERE}, line \d+: TimeoutError: no answer", 2),
    (lambda completions: [1.0], "<lambda>: returned 1 value, expected 2", 2),
    (lambda completions: 0.5, "<lambda>: returned 0.5, expected a list of 2 numbers", 2),
    (lambda completions: np.zeros(()), r"<lambda>: returned array\(0.\), expected a list of 2 numbers", 2),
    (lambda completions: jnp.ones(()), "<lambda>: returned Array.*, expected a list of 2 numbers", 2),
    (leaves, rf"leaves: all 2 completions: {HERE}, line \d+: SystemExit: 0", 2),
    (leaves_later, rf"leaves_later: all 2 completions: {HERE}, line \d+: SystemExit: 0", 2),
    (lambda completions: None, "<lambda>: returned None, expected a list of 2 numbers", 2),
    (lambda completions: {"a": 1, "b": 2}, "<lambda>: returned {'a': 1, 'b': 2}, expected a list", 2),
    (lambda completions: [1.0, "good"], "<lambda>: completion 1: 'good', expected a finite number or None", 1),
    (lambda completions: [1.0, "2"], "<lambda>: completion 1: '2', expected", 1),
    (lambda completions: [1.0, math.nan], "<lambda>: completion 1: nan, expected", 1),
    (lambda completions: [1.0, -math.inf], "<lambda>: completion 1: -inf, expected", 1),
    (lambda completions: [1.0, 1e300], r"<lambda>: completion 1: 1e\+300, expected", 1),
    (lambda completions: [1.0, np.ones(2)], r"<lambda>: completion 1: array\(\[1., 1.\]\), expected", 1),
    (lambda completions, log_extra: log_extra("a", [1]), r"log_extra\('a'\): 1 value, expected 2, one a compl", 2),
    (lambda completions, log_extra: log_extra("step", [1, 2]), r"log_extra\('step'\): found a name that is taken", 2),
    (lambda completions, log_metric: log_metric("loss", 1), r"log_metric\('loss'\): found a name that is taken", 2),
    (lambda completions: [1.0, LookupError("that one")], "<lambda>: completion 1: LookupError: that one", 1),
]


@pytest.mark.parametrize(("function", "words", "failed"), FAILURES)
def test_failures(function, words, failed):
    with pytest.raises(ValueError, match=words):
        score([length, function])
    table = score([length, function], on_error="skip")
    assert table.errors == (0, failed) and table.numbers()[f"rewards/{table.names[1]}/errors"] == failed
    assert np.isnan(table.values[:, 1]).tolist() == [failed == 2, True]
    assert table.values[:, 0].tolist() == [1, 2] and table.scored.all()


def test_all_failures_at_once_with_the_cause():
    with pytest.raises(
        ValueError, match=r"raises: all.*\n.*<lambda>: completion 0.*\n.*<lambda>: completion 1"
    ) as found:
        score([raises, lambda completions: ["a", "b"]])
    assert isinstance(found.value.__cause__, KeyError)


def test_numbers_of_other_kinds():
    values = score([lambda completions: (True, jnp.float32(0.25))]).values
    assert values.dtype == np.float32 and values[:, 0].tolist() == [1, 0.25]


def test_columns_that_do_not_fit():
    def judge(completions, answer, level=0, *, other):
        return [0, 0]

    with pytest.raises(
        ValueError, match=r"judge: wants the columns \['answer', 'other'\], the records have \['level'\]"
    ):
        score([judge], columns={"level": [1, 2]}, on_error="skip")
    with pytest.raises(ValueError, match=r"answer: 3 values, expected 2"):
        score([length], columns={"answer": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"completion_ids: the name is taken"):
        score([length], columns={"completion_ids": [1, 2]})


def test_files(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text(
        "from __future__ import annotations\nimport dataclasses\n\n\n"
        "@dataclasses.dataclass\nclass Two:\n    value: float = 2.0\n\n\n"
        "def reward(completions, **kwargs):\n    return [Two().value for _ in completions]\n\n\n"
        "async def other(completions, answer):\n    return [float(a) for a in answer]\n"
    )
    rewards = load_rewards([str(file), f"{file}:other", f"{file}:reward", f"{file}:reward"], [1, 2, 3, 4])
    assert rewards.names == ("judge", "other", "reward", "reward_2")
    assert rewards.weights.tolist() == [1, 2, 3, 4]
    assert rewards("ab", "xy", [[1], [1]], {"answer": ["1", "2"]}).values.tolist() == [[2, 1, 2, 2], [2, 2, 2, 2]]
    with pytest.raises(ValueError, match=rf"other: all 2 .*{re.escape(str(file))}, line 15: ValueError: could not"):
        rewards("ab", "xy", [[1], [1]], {"answer": ["1", "two"]})


def test_names_that_cannot_be_loaded(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text("def other():\n    pass\n")
    with pytest.raises(ValueError) as found:
        load_rewards(["accuracy", str(file), f"metric:{file}:x", f"{tmp_path}/gone.py:f", length], [1.0])
    lines = str(found.value).splitlines()
    assert lines == [
        "reward 'accuracy': expected FILE.py, FILE.py:FUNCTION, metric:FILE.py or metric:FILE.py:KEY",
        f"{file} defines no function reward(); it defines other",
        f"{file} defines no function metric(); it defines other",
        f"{tmp_path}/gone.py is not a file; expected a Python file that defines f()",
        "1 reward weight: expected one for each of 5 rewards",
    ]
    with pytest.raises(FileNotFoundError, match=r"gone.py is not a file"):
        load_rewards([f"{tmp_path}/gone.py"])


def test_the_metric_of_the_main_task_is_a_reward():
    record = {
        "prompt": CHAT,
        "functions": [{"name": "add", "parameters": {"required": ["a"]}}],
        "ground_truth": {"add": {"a": [1]}},
    }
    rewards = load_rewards([f"metric:{METRIC}:correct", f"metric:{METRIC}:valid_json"])
    texts = ['{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "arguments": {"a": 2}}', "add 1"]
    table = rewards.of_records([record] * 3, texts, [[1]] * 3)
    assert table.names == ("correct", "valid_json")
    assert table.values.tolist() == [[1, 1], [0, 1], [0, 0]]


def test_metrics_that_do_not_fit(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text("def metric(record, text):\n    return {'right': float(record['answer'] == text)}\n")
    rewards = load_rewards([f"metric:{file}"], on_error="raise")
    assert rewards.names == ("judge",)
    assert rewards("ab", "xy", [[1], [1]], {"answer": ["x", "x"]}).values[:, 0].tolist() == [1, 0]
    with pytest.raises(ValueError, match=rf"completion 1: .*{re.escape(str(file))}, line 2: KeyError: 'answer'"):
        rewards("ab", "xy", [[1], [1]], {})
    with pytest.raises(ValueError, match=r"completion 0: .*found \['right'\], expected 'wrong'"):
        score([f"metric:{file}:wrong"], columns={"answer": ["x", "x"]})
    with pytest.raises(ValueError, match=r"found \['correct', 'valid_json'\], expected only one; name yours: metric:"):
        score([f"metric:{METRIC}"])
    file.write_text("def metric(record, text):\n    return 1.0\n")
    with pytest.raises(ValueError, match=r"found 1.0, expected a dict of numbers by name"):
        score([f"metric:{file}"])
