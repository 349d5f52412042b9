"""DPO and its relatives: chosen against rejected answers, relative to a reference policy."""

import jax
import jax.numpy as jnp

from jlora import lora, losses
from jlora.losses import Pairs, TokenScores
from jlora.losses.documents import by_document
from jlora.models import Model
from jlora.train.algorithms.algorithm import Numbers, reference_params
from jlora.train.algorithms.scores import completion_scores, item_means, token_means, token_sums
from jlora.train.config import RunConfig
from jlora.train.config.settings import DPOConfig
from jlora.train.step import Batch, Metrics, Objective, Report
from jlora.types import Params

CHOSEN, REJECTED = "ref_chosen_logps", "ref_rejected_logps"


def objective(model: Model, config: RunConfig) -> Objective:
    """What a run with algorithm="dpo" minimises; see `dpo_loss`."""
    return dpo_loss(model, config.dpo, remat=config.train.remat)


def dpo_loss(model: Model, settings: DPOConfig, *, remat: bool | str = True, chunk: int = 512) -> Objective:
    """The weighted sum of the terms of `settings`: each a mean over a step's pairs, "sft" over their chosen tokens.

    The frozen half is `Base.constants`. If the batch brings the reference's log-probabilities, no reference is run.
    """

    def loss(
        trainable: Params, frozen: Params, batch: Batch, totals: Metrics, key: jax.Array | None
    ) -> tuple[jax.Array, Report]:
        params = lora.combine(frozen["policy"], trainable)
        scores = completion_scores(model, params, batch, key=key, remat=remat, chunk=chunk)
        policy = document_sums(scores.log_probs, batch, settings.ld_alpha)
        if CHOSEN in batch:
            reference = jnp.concatenate([batch[CHOSEN], batch[REJECTED]])
        else:
            reference = reference_sums(model, frozen, batch, settings.ld_alpha, chunk)
        pairs = as_pairs(policy, reference, batch)
        chosen = jnp.sum(scores.log_probs * (batch["documents"] < batch["items"].shape[0]))
        terms = {"sft": -chosen / totals["chosen_tokens"]}
        value = sum(weight * _term(name, pairs, settings, totals, terms) for name, weight in settings.terms)
        return value, _report(pairs, settings.beta, scores, batch)

    return Objective(loss, pair_totals)


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


def reference_sums(
    model: Model, frozen: Params, batch: Batch, ld_alpha: float | None = None, chunk: int = 512
) -> jax.Array:
    """`document_sums` under the reference policy, without gradients or dropout."""
    scores = completion_scores(model, reference_params(frozen), batch, chunk=chunk)
    return jax.lax.stop_gradient(document_sums(scores.log_probs, batch, ld_alpha))


def as_pairs(policy: jax.Array, reference: jax.Array, batch: Batch) -> Pairs:
    """The sums [2N] of both policies as pairs [N]."""
    slots = batch["items"].shape[0]
    tokens = by_document(batch["weights"], batch["documents"], 2 * slots)
    sides = [half for values in (policy, reference, tokens) for half in (values[:slots], values[slots:])]
    return Pairs(*sides, batch["items"])


def _term(name: str, pairs: Pairs, settings: DPOConfig, totals: Metrics, others: Metrics) -> jax.Array:
    if name in others:
        return others[name]
    per_pair = losses.dpo(
        pairs,
        loss_type=name,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        f_divergence_type=settings.f_divergence_type,
        f_alpha_divergence_coef=settings.f_alpha_divergence_coef,
        discopop_tau=settings.discopop_tau,
    )
    return jnp.sum(per_pair) / totals["items"]


def _report(pairs: Pairs, beta: float, scores: TokenScores, batch: Batch) -> Report:
    chosen, rejected = losses.dpo_rewards(pairs, beta=beta)
    items = {
        "items": pairs.items,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    return Report(token_sums(scores, batch), items)


def report(metrics: Metrics) -> Numbers:
    """The numbers that TRL logs for a step on pairs."""
    names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    margins = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    compared = {"items": metrics["items"], "rewards/accuracies": margins > 0, "rewards/margins": margins}
    differences = item_means(compared, ("rewards/accuracies", "rewards/margins"))
    return item_means(metrics, names) | differences | token_means(metrics)
