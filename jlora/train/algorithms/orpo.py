"""ORPO: likelihood and odds ratio of pairs, without a reference policy."""

import dataclasses

import jax
import jax.numpy as jnp

from jlora import lora, losses
from jlora.errors import raise_all
from jlora.models import Model
from jlora.train.algorithms import judged
from jlora.train.algorithms.algorithm import Numbers
from jlora.train.algorithms.pairs import REWARD_PANELS, likelihood_report, pair_items, pair_totals, without_reference
from jlora.train.algorithms.scores import completion_scores, item_means, token_sums
from jlora.train.settings import SharedConfig, at_least
from jlora.train.step import Batch, Metrics, Objective, Report
from jlora.types import Params


@dataclasses.dataclass(frozen=True)
class ORPOConfig:
    """Odds-ratio preference optimisation (Hong et al. 2024).

    Attributes:
        beta: weight of the odds-ratio term (lambda in the paper).
        nll_on_prompt: the likelihood term also counts the prompt's tokens, as in TRL, rather than the answer's alone.
    """

    beta: float = 0.1
    nll_on_prompt: bool = True

    def __post_init__(self) -> None:
        raise_all(at_least("orpo", self, beta=1e-12))


def objective(model: Model, config: SharedConfig, *, chunk: int = 512) -> Objective:
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
        pairs = without_reference(scores.log_probs * batch["weights"], batch)
        per_pair, log_odds_ratio, log_odds = losses.orpo(pairs, beta=settings.beta)
        nll = {"nll": -jnp.sum(scores.log_probs * likely), "nll_tokens": jnp.sum(likely)}
        value = nll["nll"] / totals["likelihood_tokens"] + jnp.sum(per_pair) / totals["items"]
        means = (
            pairs.chosen / jnp.maximum(pairs.chosen_tokens, 1),
            pairs.rejected / jnp.maximum(pairs.rejected_tokens, 1),
        )
        rewards = (settings.beta * mean for mean in means)
        items = pair_items(pairs, *means, *rewards) | {"log_odds_ratio": log_odds_ratio, "log_odds_chosen": log_odds}
        return value, Report(token_sums(scores, batch) | nll, items)

    def totals(batch: Batch) -> Metrics:
        return pair_totals(batch) | {"likelihood_tokens": jnp.maximum(jnp.sum(likelihood_weights(batch)), 1)}

    return Objective(loss, totals)


def report(metrics: Metrics) -> Numbers:
    """The numbers that TRL logs for a step."""
    return likelihood_report(metrics) | item_means(metrics, ("log_odds_ratio", "log_odds_chosen"))


def _shares(config: SharedConfig) -> bool:
    """A loss on the prompt itself does not allow answers to share it."""
    return judged.shared(config) and not config.orpo.nll_on_prompt


ORPO = judged.algorithm(judged.Method("pairs", objective, report, REWARD_PANELS, shares=_shares), {"orpo": ORPOConfig})
