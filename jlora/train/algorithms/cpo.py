"""CPO, SimPO and ORPO: pairs without a reference policy."""

import jax
import jax.numpy as jnp

from jlora import lora, losses
from jlora.losses import Pairs
from jlora.losses.documents import by_document
from jlora.models import Model
from jlora.train.algorithms import dpo
from jlora.train.algorithms.algorithm import Numbers
from jlora.train.algorithms.scores import completion_scores, item_means, token_sums
from jlora.train.config import RunConfig
from jlora.train.step import Batch, Metrics, Objective, Report
from jlora.types import Params


def cpo_objective(model: Model, config: RunConfig, *, chunk: int = 512) -> Objective:
    """The contrastive loss + cpo_alpha · the mean negative log-likelihood of the chosen answers' tokens."""
    settings = config.cpo
    form = dict(loss_type=settings.loss_type, alpha=settings.alpha)

    def loss(
        trainable: Params, frozen: Params, batch: Batch, totals: Metrics, key: jax.Array | None
    ) -> tuple[jax.Array, Report]:
        params = lora.combine(frozen["policy"], trainable)
        scores = completion_scores(model, params, batch, key=key, remat=config.train.remat, chunk=chunk)
        pairs = _pairs(scores.log_probs, batch)
        per_pair = losses.cpo(
            pairs,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            simpo_gamma=settings.simpo_gamma,
            **form,
        )
        nll = {"nll": -jnp.sum(pairs.chosen), "nll_tokens": jnp.sum(pairs.chosen_tokens)}
        value = jnp.sum(per_pair) / totals["items"] + settings.cpo_alpha * nll["nll"] / totals["chosen_tokens"]
        log_probs = losses.cpo_rewards(pairs, loss_type=settings.loss_type)
        rewards = (settings.beta * reward for reward in losses.cpo_rewards(pairs, **form))
        items = _items(pairs, *log_probs, *rewards)
        return value, Report(token_sums(scores, batch) | nll, items)

    return Objective(loss, dpo.pair_totals)


def orpo_objective(model: Model, config: RunConfig, *, chunk: int = 512) -> Objective:
    """The mean negative log-likelihood of the chosen documents + beta · the odds-ratio loss."""
    settings = config.orpo

    def likelihood_weights(batch: Batch) -> jax.Array:
        """The weights of the tokens whose likelihood counts, in a batch of shape [..., B, T]."""
        slots = batch["items"].shape[-1]
        if not settings.nll_on_prompt:
            return batch["weights"] * (batch["documents"] < slots)
        documents = batch["documents"]
        after = jnp.concatenate([documents[..., 1:], jnp.full_like(documents[..., :1], -1)], axis=-1)
        return ((documents < slots) & (documents == after)).astype(jnp.float32)

    def loss(
        trainable: Params, frozen: Params, batch: Batch, totals: Metrics, key: jax.Array | None
    ) -> tuple[jax.Array, Report]:
        params = lora.combine(frozen["policy"], trainable)
        likely = likelihood_weights(batch)
        scored = jnp.maximum(likely, batch["weights"])
        scores = completion_scores(model, params, batch, weights=scored, key=key, remat=config.train.remat, chunk=chunk)
        pairs = _pairs(scores.log_probs * batch["weights"], batch)
        per_pair, log_odds_ratio, log_odds = losses.orpo(pairs, beta=settings.beta)
        nll = {"nll": -jnp.sum(scores.log_probs * likely), "nll_tokens": jnp.sum(likely)}
        value = nll["nll"] / totals["likelihood_tokens"] + jnp.sum(per_pair) / totals["items"]
        means = (
            pairs.chosen / jnp.maximum(pairs.chosen_tokens, 1),
            pairs.rejected / jnp.maximum(pairs.rejected_tokens, 1),
        )
        rewards = (settings.beta * mean for mean in means)
        items = _items(pairs, *means, *rewards) | {"log_odds_ratio": log_odds_ratio, "log_odds_chosen": log_odds}
        return value, Report(token_sums(scores, batch) | nll, items)

    def totals(batch: Batch) -> Metrics:
        return dpo.pair_totals(batch) | {"likelihood_tokens": jnp.maximum(jnp.sum(likelihood_weights(batch)), 1)}

    return Objective(loss, totals)


def report(metrics: Metrics) -> Numbers:
    """The numbers that TRL logs for a step."""
    nll = float(metrics["nll"]) / max(float(metrics["nll_tokens"]), 1.0)
    numbers = dpo.report(metrics) | {"nll_loss": nll}
    if "log_odds_ratio" in metrics:
        numbers |= item_means(metrics, ("log_odds_ratio", "log_odds_chosen"))
    return numbers


def _pairs(log_probs: jax.Array, batch: Batch) -> Pairs:
    sums = by_document(log_probs, batch["documents"], 2 * batch["items"].shape[0])
    return dpo.as_pairs(sums, jnp.zeros_like(sums), batch)


def _items(pairs: Pairs, *values: jax.Array) -> Metrics:
    """What TRL logs of each pair: the chosen and rejected log-probabilities that the loss uses, and their rewards."""
    names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
    return {"items": pairs.items} | dict(zip(names, values, strict=True))
