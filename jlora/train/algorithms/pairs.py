"""What the objectives on pairs share: from tokens to pairs, and the numbers that TRL logs for them."""

import jax
import jax.numpy as jnp

from jlora import losses
from jlora.losses import Pairs
from jlora.losses.documents import by_document
from jlora.train.algorithms.algorithm import Numbers
from jlora.train.algorithms.scores import item_means, token_means
from jlora.train.step import Batch, Metrics

REWARD_PANELS = (
    ("Rewards", ("rewards/chosen", "rewards/rejected")),
    ("Reward accuracy", ("rewards/accuracies",)),
    ("Reward margin", ("rewards/margins",)),
)


def pair_totals(batch: Batch) -> Metrics:
    """The number of pairs in a step and of tokens in their chosen answers, at least 1 each."""
    slots = batch["items"].shape[-1]
    chosen = jnp.sum(batch["weights"] * (batch["documents"] < slots))
    return {"items": jnp.maximum(jnp.sum(batch["items"]), 1), "chosen_tokens": jnp.maximum(chosen, 1)}


def document_sums(log_probs: jax.Array, batch: Batch, ld_alpha: float | None = None) -> jax.Array:
    """The log-probability of each document's completion, [2N]: chosen, then rejected."""
    count = 2 * batch["items"].shape[0]
    if ld_alpha is not None:
        return losses.length_desensitised(log_probs, batch["weights"], batch["documents"], count, ld_alpha)
    return by_document(log_probs, batch["documents"], count)


def as_pairs(policy: jax.Array, reference: jax.Array, batch: Batch) -> Pairs:
    """The sums [2N] of both policies as pairs [N]."""
    slots = batch["items"].shape[0]
    tokens = by_document(batch["weights"], batch["documents"], 2 * slots)
    sides = [half for values in (policy, reference, tokens) for half in (values[:slots], values[slots:])]
    return Pairs(*sides, batch["items"])


def without_reference(log_probs: jax.Array, batch: Batch) -> Pairs:
    """The pairs [N] of the log-probabilities [B, T], for losses without a reference policy."""
    sums = document_sums(log_probs, batch)
    return as_pairs(sums, jnp.zeros_like(sums), batch)


def pair_items(pairs: Pairs, *values: jax.Array) -> Metrics:
    """What TRL logs of each pair: chosen and rejected log-probabilities, and chosen and rejected rewards."""
    names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
    return {"items": pairs.items} | dict(zip(names, values, strict=True))


def pair_report(metrics: Metrics) -> Numbers:
    """The numbers that TRL logs for a step on pairs."""
    names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    margins = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    compared = {"items": metrics["items"], "rewards/accuracies": margins > 0, "rewards/margins": margins}
    differences = item_means(compared, ("rewards/accuracies", "rewards/margins"))
    return item_means(metrics, names) | differences | token_means(metrics)


def likelihood_report(metrics: Metrics) -> Numbers:
    """`pair_report`, and "nll_loss" from the sums "nll" and "nll_tokens"."""
    nll = float(metrics["nll"]) / max(float(metrics["nll_tokens"]), 1.0)
    return pair_report(metrics) | {"nll_loss": nll}
