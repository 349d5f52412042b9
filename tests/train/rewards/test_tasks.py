"""reasoning-gym's tasks as records and a reward."""

import pytest

from jlora.train.rewards.judging import load_rewards
from jlora.train.rewards.tasks import SYSTEM_PROMPT, reasoning_tasks

pytest.importorskip("reasoning_gym")


def score(tasks, records, completions):
    return load_rewards([tasks.reward]).of_records(records, completions, [[1]] * len(completions))


def test_a_record_and_the_same_ones_again():
    tasks = reasoning_tasks("chain_sum", size=3, seed=0, held_out=2, min_terms=2, max_terms=2)
    assert tasks.train[1] == {
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": tasks.train[1]["prompt"][1]["content"]},
        ],
        "answer": tasks.train[1]["answer"],
        "task": "chain_sum",
        "index": 1,
    }
    assert tasks.train[1]["prompt"][1]["content"].startswith("State the final answer to the following arithmetic")
    assert [record["index"] for record in tasks.held_out] == [3, 4]
    again = reasoning_tasks("chain_sum", size=3, seed=0, held_out=2, min_terms=2, max_terms=2)
    assert (again.train, again.held_out) == (tasks.train, tasks.held_out)


def test_another_seed_gives_other_questions_and_the_instruction_is_the_callers():
    first, second = (reasoning_tasks("chain_sum", size=20, seed=seed, system_prompt="") for seed in (0, 1))
    assert all(len(record["prompt"]) == 1 for record in first.train)
    questions = [{record["prompt"][0]["content"] for record in tasks.train} for tasks in (first, second)]
    assert not questions[0] & questions[1]
    [record] = reasoning_tasks("chain_sum", size=1, seed=0, system_prompt="Be brief.").train
    assert record["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_solved_questions_stand_before_the_one_asked():
    tasks = reasoning_tasks("chain_sum", size=20, seed=0, held_out=20, num_fewshot=2, min_terms=2, max_terms=2)
    system, *turns, question = tasks.train[3]["prompt"]
    assert (system["content"], question["role"]) == (SYSTEM_PROMPT, "user")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert [record["prompt"][:-1] for record in tasks.held_out] == [[system, *turns]] * 20
    # The solutions are right, as the task itself reads them, and nothing that is shown is asked.
    shown = {turn["content"] for turn in turns[::2]}
    assert not shown & {record["prompt"][-1]["content"] for record in tasks.held_out}
    for asked, solved in zip(turns[::2], turns[1::2], strict=True):
        sum_asked = asked["content"].rpartition(": ")[2].rstrip("= ")
        left, operator, right = sum_asked.split()
        value = int(left) + int(right) if operator == "+" else int(left) - int(right)
        assert solved["content"] == f"<answer>{value}</answer>"
    plain = reasoning_tasks("chain_sum", size=1, seed=0, num_fewshot=1, system_prompt="One number.").train[0]
    assert "<answer>" not in plain["prompt"][2]["content"]
    assert load_rewards([tasks.reward]).of_records([tasks.train[3]], [tasks.train[3]["answer"]], [[1]]).values == 1


def test_the_answer_is_in_the_last_tags_or_is_the_whole_text():
    tasks = reasoning_tasks("chain_sum", size=4, seed=0, held_out=1)
    records = [*tasks.train, *tasks.held_out]
    answers = [record["answer"] for record in records]
    completions = [
        f"First <answer>no</answer>, then\n<answer> {answers[0]} </answer> I think",
        f"  {answers[1]}\n",
        "<answer>no</answer>",
        f"it is {answers[3]}",
        f"<answer>{answers[4]}</answer>",
    ]
    values = score(tasks, records, completions).values[:, 0]
    assert values[[0, 1, 2, 4]].tolist() == [1, 1, 0, 1]
    assert 0 < values[3] < 1  # reasoning-gym's own part for an answer among other words
    bits = reasoning_tasks("count_bits", size=1, seed=0)  # which counts spaces as other words
    assert score(bits, bits.train, [f"\n {bits.train[0]['answer']} \n"]).values.tolist() == [[1]]


def test_a_task_that_many_answers_solve_scores_them_itself():
    tasks = reasoning_tasks("graph_color", size=2, seed=0, min_num_vertices=4, max_num_vertices=4, num_colors=4)
    assert tasks.train[0]["answer"] is None
    answer = '{"0": 1, "1": 2, "2": 3, "3": 4}'
    found = score(tasks, [tasks.train[0]] * 2, [f"<answer>{answer}</answer>", "<answer>{}</answer>"])
    assert found.values[0, 0] == 1 > found.values[1, 0]


def test_an_answer_that_the_task_cannot_read_earns_nothing():
    tasks = reasoning_tasks("prime_factorization", size=1, seed=0)
    with pytest.raises(ValueError, match="invalid literal"):
        tasks.reward._scorer.score_answer("two", tasks.reward._entries[0])
    assert score(tasks, tasks.train, ["<answer>two</answer>"]).values.tolist() == [[0]]


def test_held_out_questions_are_not_trained_on_and_differ():
    tasks = reasoning_tasks("count_bits", size=60, seed=0, held_out=30, max_n=100)
    trained, held_out = ([r["prompt"][-1]["content"] for r in records] for records in (tasks.train, tasks.held_out))
    assert len(set(held_out)) == 30 and not set(trained) & set(held_out)


def test_two_tasks_score_their_own_records():
    sums, bits = (reasoning_tasks(name, size=1, seed=0) for name in ("chain_sum", "count_bits"))
    records = sums.train + bits.train
    table = load_rewards([sums.reward, bits.reward]).of_records(records, [r["answer"] for r in records], [[1]] * 2)
    assert table.names == ("chain_sum", "count_bits")
    assert str(table.values.tolist()) == "[[1.0, nan], [nan, 1.0]]"


def test_faults_are_named():
    with pytest.raises(ValueError, match=r"no task 'chain_sums'; did you mean chain_sum"):
        reasoning_tasks("chain_sums", size=1, seed=0)
    with pytest.raises(ValueError, match=r"no task 'zzzz'; expected one of ab, acre"):
        reasoning_tasks("zzzz", size=1, seed=0)
    with pytest.raises(ValueError, match=r"'chain_sum' with {'words': 1}: TypeError: .*'words'"):
        reasoning_tasks("chain_sum", size=1, seed=0, words=1)
    with pytest.raises(ValueError, match=r"'chain_sum' with {'min_terms': 0}: AssertionError"):
        reasoning_tasks("chain_sum", size=1, seed=0, min_terms=0)
    with pytest.raises(ValueError, match=r"only [01] of 80 questions to hold out are not among the 50 .*, expected 4"):
        reasoning_tasks("count_bits", size=50, seed=0, held_out=4, max_n=3)
    mine, other = (reasoning_tasks("chain_sum", size=1, seed=seed) for seed in (0, 1))
    with pytest.raises(ValueError, match="question 0 of 'chain_sum' is another one"):
        score(mine, other.train, ["1"])
