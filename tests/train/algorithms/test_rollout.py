"""Rollouts as arrays and back, the order of prompts, groups that say nothing, and the policy's checksum."""

import dataclasses

import numpy as np
import pytest

from jlora import data, sharding
from jlora.data import Example, Item
from jlora.errors import UserError
from jlora.generate import Completion
from jlora.train import resolve
from jlora.train.algorithms import layout, ppo, rollout
from jlora.train.algorithms.ppo import PPOConfig
from jlora.train.algorithms.prompts import Prompts, _judges
from jlora.train.rewards.judging import RewardTable

LENGTHS = [(3, 4), (2, 1), (5, 6), (1, 2), (4, 3), (2, 5)]  # of prompts and completions


def config(**data):
    return resolve(
        {
            "algorithm": "grpo",
            "model": {"path": "m"},
            "data": {"path": "d", "bucket": 4} | data,
            "train": {"steps": 1, "batch_size": 2, "grad_accum": 3, "seq_len": 24},
            "rollout": {"rewards": ("r.py",), "num_generations": 2, "max_completion_length": 8},
        }
    )


def asked(count):
    item = Item((Example(np.ones(1, np.int32), np.zeros(1, np.bool_)),))
    return Prompts(data.flat([item] * count), [{"prompt": f"question {i}"} for i in range(count)])


def made(texts=None, rewards=None, same_prompts=False):
    items, completions = [], []
    for index, (prompt, answer) in enumerate(LENGTHS):
        tokens = np.arange(prompt + answer, dtype=np.int32) + 10 * index
        if same_prompts:  # of a group, as far as the shorter one goes
            tokens[:prompt] = 100 * (index // 2) + np.arange(prompt)
        items.append(Item((Example(tokens, np.arange(len(tokens)) >= prompt),), {"index": float(index)}))
        completions.append(Completion(tokens[prompt:], np.float32(index + np.arange(answer) / 10), answer % 2 == 0))
    values = np.arange(6, dtype=np.float32)[:, None] if rewards is None else np.array(rewards, np.float32)[:, None]
    table = RewardTable(("r",), values, (0,), {}, {})
    texts = texts or [f"text {index}" for index in range(6)]
    return rollout.Rollouts([0, 0, 1, 1, 2, 2], completions, texts, items, table, values[:, 0], 7)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_numbers_of_items_and_tokens_find_their_places_and_the_way_back(packing, share):
    rollouts = made(same_prompts=share)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1))
    batch = layout.lay_out(rollouts, config(packing=packing, share_prompts=share), mesh, 2, (0,))
    assert len(batch["tokens"]) % 2 == 0
    shared = (batch["documents"] == batch["items"].shape[1]) & (batch["segment_ids"] > 0)
    assert shared.any() == share
    assert data.count_tokens(batch, 1) == sum(map(sum, LENGTHS))
    laid = layout.to_layout(batch, [completion.log_probs for completion in rollouts.completions])
    assert (laid != 0).sum() == sum(answer for _, answer in LENGTHS) - 1  # the first log-probability is 0
    # A place predicts the next token, so the completion's n-th number lies where its n-th token is the target.
    for index, completion in enumerate(rollouts.completions):
        for token, log_prob in zip(completion.tokens, completion.log_probs, strict=True):
            places = (batch["targets"] == token) & (batch["weights"] > 0)
            assert laid[places].tolist() == [pytest.approx(log_prob)], index
    sums = [completion.log_probs.sum() for completion in rollouts.completions]
    np.testing.assert_allclose(layout.by_item(batch, laid), sums, rtol=1e-6)
    spread = layout.spread(batch, np.arange(6) + 1.0)
    np.testing.assert_array_equal(spread > 0, batch["weights"] > 0)
    lengths = np.array([answer for _, answer in LENGTHS])
    np.testing.assert_allclose(layout.by_item(batch, spread), lengths * (np.arange(6) + 1))


def test_rows_are_spread_evenly_over_the_parts_and_too_few_are_taken_apart():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=4))
    rollouts = made(same_prompts=True)
    batch = layout.lay_out(rollouts, config(packing=False, share_prompts=True), mesh, 1, (0,))
    assert batch["tokens"].shape[:2] == (2, 2)  # rows of two completions each, 1 + 2, filled up for the mesh
    assert batch["items"].sum(axis=1).tolist() == [2, 4]
    apart = layout.lay_out(rollouts, config(packing=True, share_prompts=True), mesh, 4, (0,))
    assert apart["tokens"].shape[:2] == (4, 2)  # three rows of pairs are too few for four steps
    assert sorted(apart["items"].sum(axis=1).tolist()) == [1, 1, 2, 2]
    assert sorted(apart["index"][apart["items"] > 0].tolist()) == list(range(6))


def test_no_step_of_a_rollout_has_the_longest_completions_alone():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1))
    first = set()
    for drawn in range(8):
        batch = layout.lay_out(made(), config(packing=False, share_prompts=False), mesh, 3, (0, drawn))
        assert sorted(batch["index"][batch["items"] > 0].tolist()) == list(range(6))
        first.add(int(np.argmax(batch["weights"].sum(axis=(1, 2)))))
    assert len(first) > 1


def test_every_prompt_once_an_epoch_from_wherever_a_run_goes_on():
    prompts = asked(5)
    order = prompts.order(3, 0, 15)
    assert [sorted(order[start : start + 5]) for start in (0, 5, 10)] == [list(range(5))] * 3
    assert order[:5] != order[5:10]
    assert prompts.order(3, 4, 7) == order[4:11]
    assert prompts.order(4, 0, 15) != order


def test_a_group_in_which_nothing_was_generated():
    rollouts = made(texts=["a", "b", " ", "", "c", ""])
    prompts = asked(3)
    with pytest.raises(ValueError, match=r"nothing was generated.*\n  question 1$"):
        rollout.join([rollouts], "raise", 2, prompts)
    skipped = rollout.join([rollouts], "skip", 2, prompts).rewards
    np.testing.assert_array_equal(np.isnan(skipped), [False, False, True, True, False, False])


def test_without_groups_an_empty_completion_is_an_answer_unless_all_are():
    prompts = asked(3)
    some = rollout.join([made(texts=["a", "b", " ", "", "c", ""])], "raise", 1, prompts)
    assert not np.isnan(some.rewards).any()
    with pytest.raises(ValueError, match="nothing was generated"):
        rollout.join([made(texts=[""] * 6)], "raise", 1, prompts)


def test_what_rewards_say_in_some_rounds_only_is_kept():
    def said(metrics, extra):
        one = made()
        return dataclasses.replace(one, table=dataclasses.replace(one.table, metrics=metrics, extra=extra))

    prompts = asked(3)
    rounds = [said({"a": 1.0, "b": 5.0}, {"x": list("abcdef")}), said({"a": 3.0}, {"y": [1, 2, 3, 4, 5, 6]})]
    table = rollout.join(rounds, "raise", 2, prompts).table
    assert table.metrics == {"a": 2.0, "b": 5.0}
    assert table.extra == {"x": [*"abcdef", *[None] * 6], "y": [*[None] * 6, 1, 2, 3, 4, 5, 6]}


def test_groups_are_chosen_whole_and_numbered_anew():
    rollouts = made()
    prompts = asked(3)
    both = rollout.join([rollouts, made(rewards=range(6, 12))], "raise", 2, prompts)
    chosen = rollout.choose(both, np.array([5, 1]), 2)
    assert chosen.numbers == [2, 2, 1, 1]
    assert chosen.rewards.tolist() == chosen.table.values[:, 0].tolist() == [10, 11, 2, 3]
    assert [item.values["index"] for item in chosen.items] == [0, 1, 2, 3]
    assert [item.documents[0].tokens[0] for item in chosen.items] == [40, 50, 20, 30]


def test_what_is_said_of_a_rollout():
    numbers = rollout.describe(made(rewards=[0, 1, 4, np.nan, np.nan, np.nan]), 2)
    assert numbers["reward"] == pytest.approx(5 / 3)
    assert numbers["reward_std"] == pytest.approx(np.std([0, 1], ddof=1))  # the one group with two rewards
    assert (numbers["completions/min_length"], numbers["completions/max_length"]) == (1, 6)
    assert numbers["completions/mean_terminated_length"] == pytest.approx((4 + 6 + 2) / 3)
    assert numbers["completions/clipped_ratio"] == pytest.approx(0.5)


def test_another_policy_than_the_samplers_is_noticed():
    source = rollout.RolloutSource.__new__(rollout.RolloutSource)
    source._digest = made().digest
    source.observe({"policy_digest": np.array([[7], [7]], np.uint32), "finite": True})
    with pytest.raises(RuntimeError, match=r"checksum 00000007.*not the one of this step \(00000007, 00000008\)"):
        source.observe({"policy_digest": np.array([[7], [8]], np.uint32), "finite": True})
    source._digest = None  # a later step on the same rollout: the policy has moved on
    source.observe({"policy_digest": np.array([[9]], np.uint32), "finite": True})


def test_the_rest_of_a_rollout_is_left_out_after_a_step_that_was_not_finite():
    source = rollout.RolloutSource.__new__(rollout.RolloutSource)
    source._digest, source._queue = None, [{}, {}]
    source.observe({"finite": np.array(True)})
    assert not source.boundary
    source.observe({"finite": np.array(False)})
    assert source.boundary


def test_records_held_out_must_have_the_columns_too(tmp_path):
    file = tmp_path / "r.py"
    file.write_text("def reward(completions, answer):\n    return [0.0] * len(completions)\n")
    without = asked(1)
    with_answer = dataclasses.replace(without, columns=frozenset(["answer"]))
    _judges(config(), [str(file)], [with_answer])
    with pytest.raises(UserError, match=r"wants the columns \['answer'\]"):
        _judges(config(), [str(file)], [with_answer, without])


@pytest.mark.parametrize(("kl", "moves"), [(1.0, True), (np.nan, False), (np.inf, False)])
def test_a_divergence_that_is_not_finite_leaves_its_coefficient_alone(kl, moves):
    assert (ppo.next_coefficient(0.2, kl, PPOConfig(target_kl=6.0), 4) != 0.2) == moves
    assert ppo.next_coefficient(0.2, kl, PPOConfig(target_kl=None), 4) == 0.2
