"""DPO and its relatives: chosen against rejected answers, relative to a reference policy."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlora import data, lora, losses, sharding
from jlora.errors import UserError, raise_all
from jlora.losses import Pairs, TokenScores, check_dpo
from jlora.models import Model
from jlora.train.algorithms import files, judged
from jlora.train.algorithms.algorithm import Base, reference_name, reference_params
from jlora.train.algorithms.pairs import REWARD_PANELS, as_pairs, document_sums, pair_items, pair_report, pair_totals
from jlora.train.algorithms.scores import completion_scores, token_sums
from jlora.train.settings import SharedConfig
from jlora.train.step import Batch, Metrics, Objective, Report
from jlora.types import Params

CHOSEN, REJECTED = "ref_chosen_logps", "ref_rejected_logps"


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation and its relatives (Rafailov et al. 2023); `jlora.losses.dpo` has the formulas.

    Attributes:
        loss_type: "sigmoid", "sigmoid_smooth", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop",
            "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired" or "sft", or several of
            them, summed with `loss_weights`.
        loss_weights: one for each of several `loss_type`; None: 1 each.
        beta: strength of the pull towards the reference policy.
        label_smoothing: for losses whose paper has it ("sigmoid" ignores it, as in TRL; "sigmoid_smooth" does not).
        f_divergence_type: the divergence from the reference policy that is penalised (Wang et al. 2023).
        f_alpha_divergence_coef: α of "alpha_divergence".
        discopop_tau: temperature of "discopop".
        ld_alpha: weight of the tokens beyond the shorter answer's length (LD-DPO); None: 1.
        precompute_ref_log_probs: the reference scores the data once before the first step instead of at every step.
    """

    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None
    precompute_ref_log_probs: bool = False

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """(loss type, weight) of every term."""
        types = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        return tuple(zip(types, self.loss_weights or (1.0,) * len(types), strict=True))

    def __post_init__(self) -> None:
        types = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        faults = [] if types else ["dpo.loss_type: found none, expected at least one"]
        if self.loss_weights is not None and len(self.loss_weights) != len(types):
            faults.append(f"dpo.loss_weights: found {len(self.loss_weights)}, expected one for each of {len(types)}")
        faults += check_dpo(
            types,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            discopop_tau=self.discopop_tau,
        )
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            faults.append(f"dpo.ld_alpha: found {self.ld_alpha}, expected 0 to 1, or None")
        raise_all(faults)


def objective(model: Model, config: SharedConfig) -> Objective:
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


def reference_sums(
    model: Model, frozen: Params, batch: Batch, ld_alpha: float | None = None, chunk: int = 512
) -> jax.Array:
    """`document_sums` under the reference policy, without gradients or dropout."""
    scores = completion_scores(model, reference_params(frozen), batch, chunk=chunk)
    return jax.lax.stop_gradient(document_sums(scores.log_probs, batch, ld_alpha))


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
    rewards = losses.dpo_rewards(pairs, beta=beta)
    return Report(token_sums(scores, batch), pair_items(pairs, pairs.chosen, pairs.rejected, *rewards))


def _check(config: SharedConfig, items: judged.Items, held_out: judged.Items) -> None:
    """Raises UserError if the reference's log-probabilities in the files cannot be used.

    The rewards of training and evaluation would be relative to two different references, or dpo.ld_alpha is set
    although a file brings the reference's log-probabilities.
    """
    sets = [
        (some, str(path)) for some, path in ((items, config.data.train), (held_out, config.data.evaluation)) if some
    ]
    bringing = [path for some, path in sets if CHOSEN in some[0].values]
    lacking = [path for some, path in sets if CHOSEN not in some[0].values]
    if bringing and config.dpo.ld_alpha is not None:
        raise UserError(
            f"{bringing[0]} brings the reference's log-probabilities of whole answers, which dpo.ld_alpha cannot weigh "
            "token by token: leave out ref_chosen_logps and ref_rejected_logps, or dpo.ld_alpha"
        )
    if bringing and lacking:
        raise UserError(
            f"{bringing[0]} brings the reference's log-probabilities ({CHOSEN}, {REJECTED}) and {lacking[0]} does not: "
            "rewards would be against two references; give both files these fields, or neither"
        )


def _reference(config: SharedConfig, items: judged.Items) -> str:
    if CHOSEN in items[0].values:
        return f"the one whose log-probabilities are in {config.data.train}"
    name = reference_name(config)
    return f"{name}, scored once before the first step" if config.dpo.precompute_ref_log_probs else name


def _with_reference(config: SharedConfig, base: Base, items: judged.Items) -> judged.Items:
    """The pairs with the reference's log-probabilities added to their values, if these are to be known beforehand."""
    if not items or not config.dpo.precompute_ref_log_probs or CHOSEN in items[0].values:
        return items
    items = data.flat(items)
    score = sharding.jit(functools.partial(reference_sums, base.model, ld_alpha=config.dpo.ld_alpha))
    found = []
    for batch in files.in_order(config, items, judged.shared(config)):
        rows = jax.tree.map(lambda leaf: leaf[0], sharding.put_batch(batch, base.mesh))
        found.append(sharding.on_host(score(base.constants, rows)).reshape(2, -1)[:, np.asarray(rows["items"]) > 0])
    return items.with_values(dict(zip((CHOSEN, REJECTED), np.concatenate(found, axis=1), strict=True)))


DPO = judged.algorithm(
    judged.Method(
        "pairs",
        objective,
        pair_report,
        REWARD_PANELS,
        check=_check,
        reference=_reference,
        complete=_with_reference,
        values=lambda config: dict.fromkeys((CHOSEN, REJECTED), 0.0) if config.dpo.precompute_ref_log_probs else {},
    ),
    {"dpo": DPOConfig},
)
