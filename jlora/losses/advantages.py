"""Advantages from rewards of completions (NumPy, between steps) and from rewards of tokens (JAX).

Completions come group by group: `group_size` completions of the first prompt, then those of the second, and so on. A
reward of NaN is missing: it enters no mean or deviation, and its advantage is 0. What is computed from completions is
computed in float64 and returned as float32, so that equal rewards have advantages of exactly 0.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Num, Shaped

from jlora.errors import UserError, number_of

Rewards = Float[np.ndarray, " N"]
Advantages = Float32[np.ndarray, " N"]
Scale = Literal["group", "batch", "none"]
MultiObjective = Literal["sum_then_normalize", "normalize_then_sum"]


def total(values: Float[np.ndarray, "N F"], weights: Float[np.ndarray, " F"]) -> Advantages:
    """Σ_f w_f r_f over the rewards that a completion has; NaN if it has none."""
    summed = np.nansum(np.asarray(values, np.float64) * weights, axis=1)
    return np.where(np.isnan(values).all(axis=1), np.nan, summed).astype(np.float32)


def reward_advantages(
    values: Float[np.ndarray, "N F"],
    weights: Float[np.ndarray, " F"],
    group_size: int,
    *,
    multi_objective: MultiObjective = "sum_then_normalize",
    scale: Scale = "group",
    eps: float = 1e-4,
) -> Advantages:
    """Advantages of completions with several rewards.

    "sum_then_normalize": `group_advantages` of r = Σ_f w_f r_f.
    "normalize_then_sum" (GDPO, arXiv 2601.05242): z_f = (r_f - mean of group) / (std of group + eps) for every reward,
    s = Σ_f w_f z_f, and A = (s - mean of batch) / (std of batch + eps); `scale` is not used.

    Raises:
        ValueError: an unknown `multi_objective` or `scale`, or rewards that do not form such groups.
    """
    if multi_objective == "sum_then_normalize":
        return group_advantages(total(values, weights), group_size, scale=scale, eps=eps)
    if multi_objective != "normalize_then_sum":
        raise UserError(f"multi_objective {multi_objective!r}: expected 'sum_then_normalize' or 'normalize_then_sum'")
    grouped = _groups(values, group_size, least=2)
    normalized = ((grouped - _mean(grouped, 1)) / (_std(grouped, 1) + eps)).reshape(values.shape)
    summed = np.where(np.isnan(values).all(axis=1), np.nan, np.nansum(normalized * weights, axis=1))
    return _finish((summed - _mean(summed)) / (_std(summed) + eps))


def group_advantages(rewards: Rewards, group_size: int, *, scale: Scale = "group", eps: float = 1e-4) -> Advantages:
    """A = (r - mean of group) / (std + eps), std with n - 1 (GRPO, Shao et al. 2024).

    Args:
        scale: whose std to use: "group", "batch" (arXiv 2508.08221), or "none", for A = r - mean of group (Dr. GRPO,
            Liu et al. 2025).
    """
    if scale not in ("group", "batch", "none"):
        raise UserError(f"scale {scale!r}: expected 'group', 'batch' or 'none'")
    grouped = _groups(rewards, group_size, least=2 if scale == "group" else 1)
    advantages = grouped - _mean(grouped, 1)
    if scale != "none":
        advantages /= _std(grouped, 1 if scale == "group" else None) + eps
    return _finish(advantages.ravel())


def leave_one_out(rewards: Rewards, group_size: int, *, normalize: bool = False, eps: float = 1e-4) -> Advantages:
    """A_i = r_i - mean of the group's other rewards (RLOO, Ahmadian et al. 2024).

    Args:
        normalize: whether A becomes (A - mean of batch) / (std of batch + eps).
    """
    grouped = _groups(rewards, group_size, least=2)
    others = _count(grouped, 1) - 1
    baseline = (np.nansum(grouped, axis=1, keepdims=True) - grouped) / np.where(others > 0, others, np.nan)
    advantages = (grouped - baseline).ravel()
    return _finish((advantages - _mean(advantages)) / (_std(advantages) + eps) if normalize else advantages)


def reinforce_plus_plus_baseline(
    rewards: Rewards, group_size: int, lengths: Num[np.ndarray, " N"] | None = None, *, eps: float = 1e-8
) -> Advantages:
    """A = (a - mean of batch) / √(var of batch + eps) with a = r - mean of group (REINFORCE++ with baseline, Hu 2025).

    Args:
        lengths: the completions' numbers of trained tokens. With them, mean and variance (n - 1) are taken over all
            tokens, each with its completion's a, as in OpenRLHF and verl; without, over completions.
    """
    grouped = _groups(rewards, group_size, least=2)
    centered = (grouped - _mean(grouped, 1)).ravel()
    scored = ~np.isnan(centered)
    weights = np.where(scored, np.ones(len(centered)) if lengths is None else lengths, 0.0)
    return _finish(_whiten(centered, weights, eps))


def reinforce_plus_plus(
    scores: Float[np.ndarray, "*B T"],
    kl: Float[np.ndarray, "*B T"],
    mask: Shaped[np.ndarray, "*B T"],
    beta: float,
    *,
    gamma: float = 1.0,
    eps: float = 1e-8,
) -> Float32[np.ndarray, "*B T"]:
    """Advantages of tokens (REINFORCE++, Hu 2025), 0 outside the mask.

    A_t = (G_t - mean) / √(var + eps), with mean and var (n - 1) over all tokens of the batch, of the returns
    G_t = Σ_{i≥t} γ^(i-t) ρ_i with ρ_i = -β KL_i, plus the score at a completion's last token. With γ = 1 that is
    G_t = score - β Σ_{i≥t} KL_i.

    Args:
        scores: each completion's score at its tokens; only the one at the last token is read. If it is NaN, the
            completion does not count.
        mask: nonzero at completions' tokens, with at least one 0 between two completions.
    """
    counted = np.asarray(mask) != 0
    rewards = token_rewards(scores, kl, mask, beta)
    returns = np.zeros(counted.shape)
    running = np.zeros(counted.shape[:-1])
    for t in reversed(range(counted.shape[-1])):
        running = np.where(counted[..., t], rewards[..., t] + gamma * running, 0.0)
        returns[..., t] = running
    return _finish(_whiten(returns, np.where(counted & ~np.isnan(returns), 1.0, 0.0), eps))


def token_rewards(
    scores: Float[np.ndarray, "*B T"],
    kl: Float[np.ndarray, "*B T"],
    mask: Shaped[np.ndarray, "*B T"],
    beta: float,
) -> Float32[np.ndarray, "*B T"]:
    """-β KL_t at every token of the mask, plus the score at the last token of every run (Ziegler et al. 2019)."""
    counted = np.asarray(mask) != 0
    last = counted & ~np.concatenate([counted[..., 1:], np.zeros_like(counted[..., :1])], axis=-1)
    return (np.where(last, scores, 0.0) - beta * np.where(counted, kl, 0.0)).astype(np.float32)


def zero_std_groups(rewards: Rewards, group_size: int) -> Bool[np.ndarray, " G"]:
    """True for each group that teaches nothing: all of its rewards are equal, or fewer than two are known.

    DAPO samples these groups again (Yu et al. 2025). Their share is TRL's frac_reward_zero_std, except that TRL does
    not count groups with fewer than two known rewards.
    """
    grouped = _groups(rewards, group_size)
    low = np.min(grouped, axis=1, initial=np.inf, where=~np.isnan(grouped))
    high = np.max(grouped, axis=1, initial=-np.inf, where=~np.isnan(grouped))
    return high <= low


def overlong_penalty(lengths: Num[np.ndarray, " N"], max_completion_length: int, cache: int) -> Advantages:
    """The penalty, from 0 to -1, for completions of these lengths.

    It is the soft overlong punishment (eq. 13 of DAPO, Yu et al. 2025):

    0 up to L - cache, ((L - cache) - length) / cache up to L = max_completion_length, -1 beyond.
    """
    if not 0 <= cache <= max_completion_length:
        raise UserError(f"cache {cache}: expected 0 to max_completion_length = {max_completion_length}")
    over = np.asarray(lengths, np.float64) - (max_completion_length - cache)
    return -np.clip(over / cache if cache else over > 0, 0.0, 1.0).astype(np.float32)


def gae(
    rewards: Float[Array, "*B T"],
    values: Float[Array, "*B T"],
    mask: Shaped[Array, "*B T"],
    gamma: float,
    lam: float,
) -> tuple[Float32[Array, "*B T"], Float32[Array, "*B T"]]:
    """(generalised advantages, returns) (Schulman et al. 2016), 0 outside the mask.

    A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} - V_t, and returns A + V. After the end of a run, V and A are 0.

    Args:
        mask: nonzero at completions' tokens, with at least one 0 between two completions.
    """

    def step(after: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        next_value, next_advantage = after
        reward, value, counted = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        advantage, value = jnp.where(counted, advantage, 0), jnp.where(counted, value, 0)
        return (value, advantage), advantage

    columns = [jnp.moveaxis(a, -1, 0) for a in (rewards.astype(jnp.float32), values.astype(jnp.float32), mask != 0)]
    start = jnp.zeros(mask.shape[:-1], jnp.float32)
    _, advantages = jax.lax.scan(step, (start, start), tuple(columns), reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, jnp.where(mask != 0, advantages + values, 0)


def whiten(
    values: Float[Array, "*B"], mask: Shaped[Array, "*B"], *, shift_mean: bool = True, eps: float = 1e-8
) -> Float32[Array, "*B"]:
    """(x - mean) / √(var + eps) over the mask, var with n - 1; 0 outside the mask.

    Args:
        shift_mean: if False, the mean is added back. PPO whitens advantages with it and rewards without.
    """
    counted = mask != 0
    count = jnp.sum(counted)
    mean = jnp.sum(values, where=counted) / jnp.maximum(count, 1)
    variance = jnp.sum(jnp.square(values - mean), where=counted) / jnp.maximum(count - 1, 1)
    whitened = (values - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(counted, whitened if shift_mean else whitened + mean, 0).astype(jnp.float32)


def kl_estimate(
    log_probs: Float[Array, "*B"], reference: Float[Array, "*B"], kind: Literal["k1", "k2", "k3"]
) -> Float[Array, "*B"]:
    """Every sampled token's estimate of KL(policy ‖ reference) (Schulman 2020).

    With d = log policy - log reference:

    k1 = d, unbiased but of any sign; k2 = d²/2, whose gradient is unbiased; k3 = exp(-d) - 1 + d, unbiased and ≥ 0.
    """
    difference = log_probs - reference
    if kind == "k1":
        return difference
    if kind == "k2":
        return jnp.square(difference) / 2
    if kind == "k3":
        return jnp.expm1(-difference) + difference
    raise UserError(f"kl estimator {kind!r}: expected 'k1', 'k2' or 'k3'")


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, n: int) -> float:
    """The coefficient after n completions, β (1 + clip(KL/target - 1, -0.2, 0.2) n/horizon) (Ziegler et al. 2019)."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


def _groups(values: Float[np.ndarray, "N *F"], group_size: int, least: int = 1) -> Float[np.ndarray, "G S *F"]:
    if group_size < least:
        raise UserError(f"groups of {group_size}: expected at least {least} completions, for a mean to compare with")
    if len(values) % group_size:
        raise UserError(f"{number_of(len(values), 'completion')}: expected a multiple of the group's {group_size}")
    return np.asarray(values, np.float64).reshape(-1, group_size, *values.shape[1:])


def _count(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.sum(~np.isnan(values), axis=axis, keepdims=True)


def _mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The mean of the known values; NaN if there are none."""
    count = _count(values, axis)
    return np.nansum(values, axis=axis, keepdims=True) / np.where(count > 0, count, np.nan)


def _std(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The standard deviation (n - 1) of the known values; NaN if there are fewer than two."""
    count = _count(values, axis)
    squares = np.nansum(np.square(values - _mean(values, axis)), axis=axis, keepdims=True)
    return np.sqrt(squares / np.where(count > 1, count - 1, np.nan))


def _whiten(values: np.ndarray, weights: np.ndarray, eps: float) -> np.ndarray:
    values = np.where(weights > 0, values, 0.0)
    count = weights.sum()
    mean = np.sum(values * weights) / max(count, 1)
    variance = np.sum(np.square(values - mean) * weights) / max(count - 1, 1)
    return np.where(weights > 0, (values - mean) / np.sqrt(variance + eps), 0.0)


def _finish(advantages: np.ndarray) -> np.ndarray:
    return np.nan_to_num(advantages, nan=0.0).astype(np.float32)
