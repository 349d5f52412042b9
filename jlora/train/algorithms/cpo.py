"""CPO, SimPO and AlphaPO: pairs without a reference policy."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jlora import lora, losses
from jlora.errors import raise_all
from jlora.models import Model
from jlora.train.algorithms import judged
from jlora.train.algorithms.pairs import REWARD_PANELS, likelihood_report, pair_items, pair_totals, without_reference
from jlora.train.algorithms.scores import completion_scores, token_sums
from jlora.train.settings import SharedConfig, at_least
from jlora.train.step import Batch, Metrics, Objective, Report
from jlora.types import Params


@dataclasses.dataclass(frozen=True)
class CPOConfig:
    """Contrastive preference optimisation (Xu et al. 2024) and SimPO (Meng et al. 2024), without a reference.

    Attributes:
        loss_type: what is made of the margin between chosen and rejected answers; that of "simpo" and "ipo" is of their
            mean log-probability per token.
        beta: factor of the margin.
        cpo_alpha: weight of the chosen answers' negative log-likelihood; 0 in SimPO proper.
        label_smoothing: for "sigmoid" and "simpo": the share of pairs whose order is assumed to be wrong.
        simpo_gamma: SimPO's target margin (with loss_type="simpo").
        alpha: shape of the reward (AlphaPO, Gupta et al. 2025); 0 is the log-probability.
    """

    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0

    def __post_init__(self) -> None:
        faults = at_least("cpo", self, beta=1e-12, label_smoothing=0, cpo_alpha=0)
        if self.label_smoothing >= 0.5:
            faults.append(f"cpo.label_smoothing: found {self.label_smoothing}, expected less than 0.5")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "simpo"):
            faults.append(f"cpo.label_smoothing: has no effect with cpo.loss_type={self.loss_type!r}")
        if self.simpo_gamma != CPOConfig.simpo_gamma and self.loss_type != "simpo":
            faults.append(f"cpo.simpo_gamma: has no effect with cpo.loss_type={self.loss_type!r}")
        raise_all(faults)


def objective(model: Model, config: SharedConfig, *, chunk: int = 512) -> Objective:
    """The contrastive loss + cpo_alpha · the mean negative log-likelihood of the chosen answers' tokens."""
    settings = config.cpo
    form = dict(loss_type=settings.loss_type, alpha=settings.alpha)

    def loss(
        trainable: Params, frozen: Params, batch: Batch, totals: Metrics, key: jax.Array | None
    ) -> tuple[jax.Array, Report]:
        params = lora.combine(frozen["policy"], trainable)
        scores = completion_scores(model, params, batch, key=key, remat=config.train.remat, chunk=chunk)
        pairs = without_reference(scores.log_probs, batch)
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
        items = pair_items(pairs, *log_probs, *rewards)
        return value, Report(token_sums(scores, batch) | nll, items)

    return Objective(loss, pair_totals)


CPO = judged.algorithm(judged.Method("pairs", objective, likelihood_report, REWARD_PANELS), {"cpo": CPOConfig})
