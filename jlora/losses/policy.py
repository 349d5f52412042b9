"""Losses of policy-gradient methods on sampled tokens' log-probabilities: one number for each token, and their sums."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora.errors import UserError
from jlora.losses.documents import by_document, to_tokens

LEVELS = ("token", "sequence", "sequence_sum")
# TRL's loss types → (the rule of `policy_loss`, the `how` of `aggregate`).
POLICY_LOSS_TYPES = {
    "grpo": ("clip", "sequence_mean"),
    "bnpo": ("clip", "micro_batch_tokens"),
    "dr_grpo": ("clip", "constant"),
    "dapo": ("clip", "tokens"),
    "luspo": ("clip", "sequence_sum"),
    "cispo": ("cispo", "tokens"),
    "sapo": ("sapo", "sequence_mean"),
}
AGGREGATIONS = ("sequence_mean", "sequence_sum", "micro_batch_tokens", "constant", "tokens", "prompt_tokens")


def ratios(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    documents: Int[Array, "B T"],
    count: int,
    level: str,
) -> Float[Array, "B T"]:
    """How much likelier a token is under the policy than under the one that sampled it; 1 where the weight is 0.

    * token: exp(log p - log p_old) (PPO: Schulman et al., 2017; GRPO: Shao et al., 2024).
    * sequence: exp of the document's mean of that, at each of its tokens (GSPO: Zheng et al., 2025).
    * sequence_sum: exp of the document's sum, the ratio of the whole completion (RLOO: Ahmadian et al., 2024).

    Raises:
        ValueError: `level` is unknown.
    """
    counted = weights != 0
    log_ratio = jnp.where(counted, log_probs - old_log_probs, 0)
    if level == "token":
        return jnp.exp(log_ratio)
    if level not in LEVELS:
        raise UserError(f"level {level!r}: expected one of {', '.join(LEVELS)}")
    sums = by_document(log_ratio, documents, count)
    if level == "sequence":
        sums = sums / jnp.maximum(by_document(weights, documents, count), 1)
    return jnp.exp(jnp.where(counted, to_tokens(sums, documents), 0))


def policy_loss(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    documents: Int[Array, "B T"],
    count: int,
    *,
    loss_type: str,
    level: str,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]:
    """(each token's loss, whether the lower bound stops its gradient, whether the upper bound does).

    With ρ: `ratios`, A: advantage.

    * grpo, bnpo, dr_grpo, dapo, luspo: -min(min(ρ, delta) A, clip(ρ, 1 - epsilon, 1 + epsilon_high) A) (PPO: Schulman
      et al., 2017; two bounds: DAPO, Yu et al., 2025; delta: INTELLECT-2, 2025). They differ in `aggregate`.
    * cispo: -stop_gradient(min(ρ, epsilon_high)) A log p (MiniMax-M1, 2025). As in TRL, the bound is not
      1 + epsilon_high.
    * sapo: -4/τ σ(τ(ρ - 1)) A, with τ by the advantage's sign (Gao et al., 2025).

    Args:
        loss_type: a name of POLICY_LOSS_TYPES.
        level: the level of `ratios`.
        epsilon_high: None for `epsilon`.
        delta: None for no bound.
    """
    ratio = ratios(log_probs, old_log_probs, weights, documents, count, level)
    high = epsilon if epsilon_high is None else epsilon_high
    nowhere = jnp.zeros(ratio.shape, bool)
    rule, _ = POLICY_LOSS_TYPES[loss_type]
    if rule == "cispo":
        bounded = jax.lax.stop_gradient(jnp.minimum(ratio, high))
        return -bounded * advantages * log_probs, nowhere, (ratio > high) & (advantages > 0)
    if rule == "sapo":
        temperature = jnp.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
        return -4 / temperature * jax.nn.sigmoid(temperature * (ratio - 1)) * advantages, nowhere, nowhere
    clipped = jnp.clip(ratio, 1 - epsilon, 1 + high)
    bounded = ratio if delta is None else jnp.minimum(ratio, delta)
    loss = -jnp.minimum(bounded * advantages, clipped * advantages)
    return loss, (bounded < 1 - epsilon) & (advantages < 0), (bounded > 1 + high) & (advantages > 0)


def kl3(
    reference: Float[Array, "B T"], log_probs: Float[Array, "B T"], ratio: Float[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """exp(d) - d - 1, d = log p_reference - log p: the k3 estimate of KL(policy ‖ reference) (Schulman, 2020).

    Args:
        ratio: a factor that makes the gradient unbiased too for tokens of an older policy (DeepSeek-V3.2, 2025; TRL's
            use_bias_correction_kl); None for GRPO's estimate.
    """
    difference = reference - log_probs
    estimate = jnp.exp(difference) - difference - 1
    return estimate if ratio is None else estimate * ratio


def aggregate(
    per_token: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    documents: Int[Array, "B T"],
    items: Float[Array, " N"],
    *,
    how: str,
    totals: dict[str, jax.Array],
    max_completion_length: int | None = None,
    group_tokens: Float[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """A micro-batch's part of a step's loss, which is the sum of all parts. w: weights, ℓ: per_token.

    * sequence_mean: 1/items Σ_document (Σ wℓ / Σ w) (GRPO: Shao et al., 2024).
    * sequence_sum: 1/items Σ_document Σ wℓ (LUSPO: Liu et al., 2026).
    * micro_batch_tokens: 1/micro_batches Σ_micro-batch (Σ wℓ / Σ w), TRL's bnpo; depends on how a step is divided.
    * constant: Σ wℓ / (items · max_completion_length) (Dr. GRPO: Liu et al., 2025).
    * tokens: Σ wℓ / tokens, all tokens of the step alike; this is what TRL and verl call DAPO (Yu et al., 2025).
    * prompt_tokens: 1/prompts Σ_prompt (Σ wℓ / Σ w over the prompt's completions); this is DAPO's formula, an
      expectation over prompts of a token mean within the group. TRL's issue 5375 discusses the two.

    Documents without a counted token add 0, but count as items.

    Args:
        items: 1 for a document, 0 for an empty slot.
        how: one of the above.
        totals: sums over the whole step of what these divide by: items, tokens (Σ w), micro_batches, prompts.
        max_completion_length: for "constant".
        group_tokens: for "prompt_tokens", the counted tokens of all completions of the document's prompt.

    Raises:
        ValueError: `how` is unknown.
    """
    counted = jnp.where(weights != 0, per_token, 0) * weights
    sums = by_document(counted, documents, items.shape[0])
    if how == "sequence_mean":
        tokens = by_document(weights, documents, items.shape[0])
        return jnp.sum(items * sums / jnp.maximum(tokens, 1)) / jnp.maximum(totals["items"], 1)
    if how == "sequence_sum":
        return jnp.sum(items * sums) / jnp.maximum(totals["items"], 1)
    if how == "micro_batch_tokens":
        return jnp.sum(counted) / jnp.maximum(jnp.sum(weights), 1) / totals["micro_batches"]
    if how == "constant":
        return jnp.sum(counted) / (jnp.maximum(totals["items"], 1) * max_completion_length)
    if how == "tokens":
        return jnp.sum(counted) / jnp.maximum(totals["tokens"], 1)
    if how == "prompt_tokens":
        return jnp.sum(items * sums / jnp.maximum(group_tokens, 1)) / jnp.maximum(totals["prompts"], 1)
    raise UserError(f"how {how!r}: expected one of {', '.join(AGGREGATIONS)}")


def ppo_policy(
    ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], *, clip: float = 0.2
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """(max(-ρA, -clip(ρ, 1 - clip, 1 + clip) A), where the second is larger) (Schulman et al., 2017)."""
    plain, clipped = -ratio * advantages, -jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    return jnp.maximum(plain, clipped), clipped > plain


def ppo_value(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    *,
    clip: float = 0.2,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """(½ max((v - R)², (v_c - R)²), where the second is larger) (Schulman et al., 2017), as in OpenAI Baselines.

    v_c = v clipped to old_values ± clip.
    """
    plain = jnp.square(values - returns)
    clipped = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
    return 0.5 * jnp.maximum(plain, clipped), clipped > plain
