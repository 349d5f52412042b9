"""Preference losses on documents' log-probabilities: one number for each item, 0 in an empty slot.

TRL minimises their sum over items, divided by the number of items. Losses with pairs and a reference are in dpo.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora.losses.documents import by_document, rank, to_tokens

CPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "simpo")
KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")


class Pairs(NamedTuple):
    """N slots, each for two completions of one prompt, float32 [N].

    Attributes:
        chosen, rejected: log-probability of the better and of the worse completion, summed over tokens.
        reference_chosen, reference_rejected: the same under the reference policy, constants. Losses without a reference
            do not read them.
        chosen_tokens, rejected_tokens: how many tokens were summed.
        items: 1 for an item, 0 for an empty slot, whose sums are 0.
    """

    chosen: jax.Array
    rejected: jax.Array
    reference_chosen: jax.Array | None
    reference_rejected: jax.Array | None
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array
    items: jax.Array


def mean_nll(
    log_probs: Float[Array, " N"], items: Float[Array, " N"], mean_tokens: Float[Array, ""]
) -> Float[Array, " N"]:
    """-log_probs / mean_tokens: the negative log-likelihood as a term to add to a preference loss.

    With mean_tokens = tokens / items, the sum over items divided by their number is the mean over tokens. TRL counts
    those of a micro-batch (DPO's "sft", CPO's and ORPO's term); if they are counted over a whole step, the loss does
    not depend on how the step is divided into micro-batches.
    """
    return of_items(items, -log_probs / mean_tokens)


def length_desensitised(
    log_probs: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    documents: Int[Array, "B T"],
    count: int,
    alpha: float,
) -> Float[Array, "{count}"]:
    """Σ log p over the first l tokens + α Σ log p over the rest (LD-DPO, Liu et al., 2024).

    l is the pair's shorter length. Documents 0 … count/2-1 are the chosen ones, the rest the rejected ones in the same
    order.
    """
    chosen, rejected = jnp.split(by_document(weights, documents, count), 2)
    shared = to_tokens(jnp.tile(jnp.minimum(chosen, rejected), 2), documents)
    factor = jnp.where(rank(weights, documents, count) <= shared, 1.0, alpha)
    return by_document(log_probs * weights * factor, documents, count)


def cpo(
    pairs: Pairs,
    *,
    loss_type: str,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
) -> Float[Array, " N"]:
    """The loss of contrastive preference optimisation, which needs no reference, for every pair.

    m = β(reward(chosen) - reward(rejected)), ε: label_smoothing. A completion's reward is its log-probability ℓ (CPO:
    Xu et al., 2024), or with alpha (1 - exp(-alpha ℓ))/alpha (AlphaPO: Gupta et al., 2025); for ipo and simpo, ℓ is
    the mean over tokens.

    * sigmoid: -(1-ε) log σ(m) - ε log σ(-m).
    * simpo: the same of m - simpo_gamma (Meng et al., 2024, who add no likelihood term: TRL's cpo_alpha is 0).
    * hinge: max(0, 1 - m).
    * ipo: (m/β - 1/2β)².
    """
    chosen, rejected = cpo_rewards(pairs, loss_type=loss_type, alpha=alpha)
    difference = chosen - rejected
    shift = simpo_gamma if loss_type == "simpo" else 0.0
    losses = {
        "sigmoid": lambda: smooth(beta * difference, label_smoothing),
        "simpo": lambda: smooth(beta * difference - shift, label_smoothing),
        "hinge": lambda: jax.nn.relu(1 - beta * difference),
        "ipo": lambda: jnp.square(difference - 1 / (2 * beta)),
    }
    return of_items(pairs.items, losses[loss_type]())


def cpo_rewards(pairs: Pairs, *, loss_type: str, alpha: float = 0.0) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """The rewards of chosen and of rejected that `cpo` compares; TRL logs them times β, without gradients."""
    logps = means(pairs) if loss_type in ("ipo", "simpo") else (pairs.chosen, pairs.rejected)
    if not alpha:
        return logps
    return tuple(-jnp.expm1(-alpha * logp) / alpha for logp in logps)


def orpo(pairs: Pairs, *, beta: float = 0.1) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """(-β log σ(o), log σ(o), o) with o = log odds(chosen) - log odds(rejected) (Hong et al., 2024).

    odds = p/(1-p), and log p is the mean over tokens. TRL logs the last two as log_odds_ratio and log_odds_chosen. The
    likelihood term (`mean_nll`) is not included: TRL's covers the prompt too, LLaMA-Factory's only the completion. A p
    that float32 cannot tell from 1 is clipped to 1 - 1e-7, where TRL's odds are infinite.
    """
    chosen, rejected = (jnp.minimum(logp, -1e-7) for logp in means(pairs))
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    ratio = jax.nn.log_sigmoid(odds)
    return tuple(of_items(pairs.items, values) for values in (-beta * ratio, ratio, odds))


def kto(
    policy: Float[Array, " N"],
    reference: Float[Array, " N"],
    label: Bool[Array, " N"],
    items: Float[Array, " N"],
    *,
    kl: Float[Array, ""],
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, " N"]:
    """The loss of Kahneman-Tversky optimisation for unpaired completions (Ethayarajh et al., 2024).

    x = log(policy / reference), w_d: desirable_weight, w_u: undesirable_weight.

    * kto: w_d (1 - σ(β(x - kl))) for desirable ones (label), w_u (1 - σ(β(kl - x))) for others; kl from `kto_kl`.
    * apo_zero_unpaired: the same with kl = 0 (D'Oosterlinck et al., 2024).
    """
    kl = {"kto": kl, "apo_zero_unpaired": jnp.zeros_like(kl)}[loss_type]
    value = beta * (policy - reference - kl)
    losses = jnp.where(
        label, desirable_weight * (1 - jax.nn.sigmoid(value)), undesirable_weight * (1 - jax.nn.sigmoid(-value))
    )
    return of_items(items, losses)


def kto_kl(policy: Float[Array, " N"], reference: Float[Array, " N"], items: Float[Array, " N"]) -> Float[Array, ""]:
    """max(0, mean log(policy / reference)) over prompts with another prompt's completions; no gradient flows."""
    total = jnp.sum(of_items(items, policy - reference))
    return jax.lax.stop_gradient(jax.nn.relu(total / jnp.maximum(jnp.sum(items), 1)))


def reward_model(
    chosen: Float[Array, " N"],
    rejected: Float[Array, " N"],
    items: Float[Array, " N"],
    *,
    margin: Float[Array, " N"] | None = None,
    center_rewards_coefficient: float | None = None,
) -> Float[Array, " N"]:
    """-log σ(chosen - rejected - margin) + coefficient (chosen + rejected)² for pairs of rewards.

    Bradley and Terry, 1952; Ouyang et al., 2022; margin: Touvron et al., 2023; centring: Eisenstein et al., 2023.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    losses = -jax.nn.log_sigmoid(difference)
    if center_rewards_coefficient is not None:
        losses += center_rewards_coefficient * jnp.square(chosen + rejected)
    return of_items(items, losses)


def of_items(items: jax.Array, values: jax.Array) -> jax.Array:
    """The values, 0 in empty slots."""
    return jnp.where(items != 0, values, 0)


def mean(sums: jax.Array, tokens: jax.Array) -> jax.Array:
    """The means over tokens; 0 if there are none, whose sum is 0."""
    return sums / jnp.maximum(tokens, 1)


def means(pairs: Pairs) -> tuple[jax.Array, jax.Array]:
    """The mean log-probability per token, of chosen and of rejected."""
    return mean(pairs.chosen, pairs.chosen_tokens), mean(pairs.rejected, pairs.rejected_tokens)


def smooth(margin: jax.Array, smoothing: float) -> jax.Array:
    """-log σ(margin), smoothed for labels of which a share `smoothing` is flipped."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, without cancellation on either side of -log 2, in value and gradient."""
    near = x > -0.6931472
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1))), jnp.log1p(-jnp.exp(jnp.where(near, -1, x))))
