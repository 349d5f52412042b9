"""Advantages against TRL's own lines, and against loops that spell the formulas out."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import textwrap
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jlora.losses import advantages

NAN = np.nan


def trl_source(file):
    pytest.importorskip("trl")
    if importlib.metadata.version("trl") != "1.16.0":
        pytest.skip("the lines that are run here are those of TRL 1.16.0")
    return (pathlib.Path(importlib.util.find_spec("trl").origin).parent / "trainer" / file).read_text()


def trl_advantages(file, first, values, **settings):
    """Runs TRL's lines from `first` to the one that zeroes NaN, on values [N, F]."""
    code = trl_source("utils.py")
    nanstd = next(n for n in ast.parse(code).body if isinstance(n, ast.FunctionDef) and n.name == "nanstd")
    scope = {"torch": torch}
    exec(ast.get_source_segment(code, nanstd), scope)
    source = trl_source(file)
    last = "advantages = torch.nan_to_num(advantages, nan=0.0)"
    start = source.rindex("\n", 0, source.index(first)) + 1
    lines = source[start : source.index(last) + len(last)]
    trainer = types.SimpleNamespace(
        reward_weights=torch.tensor(settings.pop("weights")), reward_funcs=[None] * values.shape[1], **settings
    )
    scope |= {
        "self": trainer,
        "device": "cpu",
        "num_generations": settings["num_generations"],
        "rewards_per_func": torch.tensor(values),
    }
    exec(textwrap.dedent(lines), scope)
    return scope["advantages"].numpy(), scope


def rewards_with_gaps(groups=5, size=4, functions=3, seed=0):
    values = np.random.default_rng(seed).normal(size=(groups * size, functions)).astype(np.float32)
    values[[0, 5, 9], [0, 1, 2]] = NAN
    values[[2, 8, 9, 10]] = NAN  # the third group keeps one completion
    values[12:16, 0] = [NAN, NAN, NAN, 1.0]  # this reward one
    values[16:20] = 0.5
    return values


@pytest.mark.parametrize("multi_objective", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_as_in_trl(multi_objective, scale):
    values, weights = rewards_with_gaps(), np.array([1.0, 0.5, 2.0], np.float32)
    found = advantages.reward_advantages(values, weights, 4, multi_objective=multi_objective, scale=scale)
    expected, scope = trl_advantages(
        "grpo_trainer.py",
        "unscorable_mask = torch.isnan(rewards_per_func)",
        values,
        weights=[1.0, 0.5, 2.0],
        multi_objective_aggregation=multi_objective,
        scale_rewards=scale,
        num_generations=4,
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.abs(expected).max() > 0.5
    if multi_objective == "sum_then_normalize":
        np.testing.assert_allclose(advantages.total(values, weights), scope["rewards"], atol=1e-6)
    if multi_objective == "sum_then_normalize" and scale != "batch":
        full = np.delete(np.arange(5), 2)  # the group of one completion: TRL's std is NaN and counts as not 0
        flat = scope["is_std_zero"].numpy().reshape(5, 4)[:, 0]
        zero = advantages.zero_std_groups(advantages.total(values, weights), 4)
        assert zero[full].tolist() == flat[full].tolist() == [False, False, False, True]
        assert zero[2] and not flat[2]


@pytest.mark.parametrize("normalize", [False, True])
def test_leave_one_out_as_in_trl(normalize):
    values = rewards_with_gaps(functions=3)
    expected, _ = trl_advantages(
        "rloo_trainer.py",
        "unscorable_mask = torch.isnan(rewards_per_func)",
        values,
        weights=[1.0, 1.0, 1.0],
        reward_clip_range=None,
        beta=0.0,
        num_generations=4,
        normalize_advantages=normalize,
    )
    found = advantages.leave_one_out(advantages.total(values, np.ones(3, np.float32)), 4, normalize=normalize)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found[1] != 0 and not found[[2, 8, 9, 10, 11]].any()


def test_a_group_by_hand():
    found = advantages.group_advantages(np.array([1, 0, 0, NAN, 2, 2, 2, 2], np.float32), 4)
    std = np.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2)
    np.testing.assert_allclose(found[:3], np.array([2 / 3, -1 / 3, -1 / 3]) / (std + 1e-4), rtol=1e-6)
    assert not found[3:].any() and found.dtype == np.float32


def test_equal_rewards_teach_nothing_however_they_round():
    rewards = np.full(7, 1000.1, np.float32)
    assert not advantages.group_advantages(rewards, 7).any()
    assert not advantages.leave_one_out(rewards, 7).any()
    assert not advantages.reinforce_plus_plus_baseline(rewards, 7).any()
    assert advantages.zero_std_groups(rewards, 7).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: advantages.group_advantages(r, 1), "groups of 1: expected at least 2"),
        (lambda r: advantages.leave_one_out(r, 1), "groups of 1"),
        (lambda r: advantages.reward_advantages(r[:, None], r[:1], 1, multi_objective="normalize_then_sum"), "of 1"),
        (lambda r: advantages.group_advantages(r, 4), "6 completions: expected a multiple of the group's 4"),
        (lambda r: advantages.overlong_penalty(r, 10, 11), "cache 11: expected 0 to max_completion_length = 10"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_group(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.arange(6, dtype=np.float32))


def test_one_completion_a_prompt_is_enough_without_a_group_std():
    rewards = np.arange(4, dtype=np.float32)
    assert not advantages.group_advantages(rewards, 1, scale="batch").any()


def test_overlong_penalty_as_in_trl():
    source = trl_source("../rewards/other_rewards.py")
    scope = {}
    exec(source, scope)
    for limit, cache in ((100, 20), (10, 10), (8, 0)):
        lengths = np.arange(120)
        expected = scope["get_soft_overlong_punishment"](limit, cache)([[1] * n for n in lengths])
        np.testing.assert_allclose(advantages.overlong_penalty(lengths, limit, cache), expected, atol=1e-6)


def test_reinforce_plus_plus_baseline_weighs_tokens():
    rewards = np.array([1, 0, 3, NAN, 0, 5], np.float32)
    lengths = np.array([3, 1, 2, 9, 4, 2])
    found = advantages.reinforce_plus_plus_baseline(rewards, 2, lengths)
    centered = torch.tensor([0.5, -0.5, 0.0, 0.0, -2.5, 2.5])
    kept = [0, 1, 2, 4, 5]
    tokens = torch.cat([centered[i].repeat(int(lengths[i])) for i in kept])
    expected = (centered - tokens.mean()) / torch.sqrt(tokens.var() + 1e-8)
    np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-5)
    assert found[3] == 0
    plain = advantages.reinforce_plus_plus_baseline(rewards, 2)
    np.testing.assert_allclose(plain[kept], (centered[kept] - centered[kept].mean()) / centered[kept].std(), rtol=1e-5)


# Two micro-batches of two rows; runs of completions, several in a row, some at the very ends.
MASK = np.array(
    [
        [[1, 1, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
    ],
    np.float32,
)


def runs():
    for row in np.ndindex(MASK.shape[:2]):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], MASK[row], [0]])))
        yield from ((row, start, end) for start, end in edges.reshape(-1, 2))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_by_loops(gamma):
    rng = np.random.default_rng(0)
    kl, beta = rng.normal(size=MASK.shape).astype(np.float32), 0.3
    scores, expected = np.full(MASK.shape, 77.0, np.float32), np.zeros(MASK.shape)
    for number, (row, start, end) in enumerate(runs()):
        scores[row][start:end] = number
        for t in range(start, end):
            rest = sum(gamma ** (i - t) * kl[row][i] for i in range(t, end))
            expected[row][t] = gamma ** (end - 1 - t) * number - beta * rest
    kept = torch.tensor(expected[MASK > 0])
    expected = np.where(MASK > 0, (expected - kept.mean().item()) / np.sqrt(kept.var().item() + 1e-8), 0)
    found = advantages.reinforce_plus_plus(scores, kl, MASK, beta, gamma=gamma)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_reinforce_plus_plus_leaves_a_completion_without_a_score_out():
    kl, scores = np.zeros(MASK.shape, np.float32), np.random.default_rng(0).normal(size=MASK.shape).astype(np.float32)
    scores[0, 0, 5] = NAN
    without = MASK.copy()
    without[0, 0, 3:6] = 0
    found = advantages.reinforce_plus_plus(scores, kl, MASK, 0.1)
    np.testing.assert_array_equal(found, advantages.reinforce_plus_plus(scores, kl, without, 0.1))
    assert not found[0, 0, 3:6].any() and found.any()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_by_loops(gamma, lam):
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, *MASK.shape)).astype(np.float32)
    expected = np.zeros(MASK.shape)
    for row, start, end in runs():
        delta = [
            rewards[row][t] + (gamma * values[row][t + 1] if t + 1 < end else 0) - values[row][t]
            for t in range(start, end)
        ]
        for t in range(start, end):
            expected[row][t] = sum((gamma * lam) ** i * d for i, d in enumerate(delta[t - start :]))
    found, returns = advantages.gae(*map(jnp.asarray, (rewards, values, MASK)), gamma, lam)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(MASK > 0, expected + values, 0), atol=1e-5)


def test_whiten_has_the_unbiased_variance():
    values = np.random.default_rng(2).normal(3, 2, MASK.shape).astype(np.float32)
    kept = torch.tensor(values)[torch.tensor(MASK) > 0]
    expected = (values - kept.mean().item()) * torch.rsqrt(kept.var() + 1e-8).item()
    args = jnp.asarray(values), jnp.asarray(MASK)
    np.testing.assert_allclose(advantages.whiten(*args), np.where(MASK > 0, expected, 0), atol=1e-5)
    moved = np.where(MASK > 0, expected + kept.mean().item(), 0)
    np.testing.assert_allclose(advantages.whiten(*args, shift_mean=False), moved, atol=1e-5)
    assert not np.isnan(advantages.whiten(args[0], jnp.zeros(MASK.shape))).any()


def test_kl_estimates_of_a_known_divergence():
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    kl = float(np.sum(policy * np.log(policy / reference)))
    log_probs, others = jnp.log(jnp.float32(policy)), jnp.log(jnp.float32(reference))
    for kind in ("k1", "k3"):
        np.testing.assert_allclose(policy @ advantages.kl_estimate(log_probs, others, kind), kl, rtol=1e-5)
    np.testing.assert_allclose(
        advantages.kl_estimate(log_probs, others, "k2"), np.log(policy / reference) ** 2 / 2, rtol=1e-5
    )
    assert (advantages.kl_estimate(log_probs, others, "k3") > 0).all()
    with pytest.raises(ValueError, match="'k4': expected 'k1', 'k2' or 'k3'"):
        advantages.kl_estimate.__wrapped__(log_probs, others, "k4")


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.0 + 0.1 * 0.0256), (60.0, 1.00512), (0.0, 0.99488)])
def test_the_kl_coefficient_follows_the_divergence(kl, factor):
    assert advantages.next_kl_coef(0.2, kl, 6.0, 10_000.0, 256) == pytest.approx(0.2 * factor)
