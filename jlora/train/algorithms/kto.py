"""KTO: single answers labelled good or bad, relative to a reference policy."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlora import data, lora, losses
from jlora.errors import raise_all
from jlora.losses.documents import by_document
from jlora.models import Model
from jlora.train.algorithms import judged
from jlora.train.algorithms.algorithm import Numbers, reference_name, reference_params
from jlora.train.algorithms.scores import completion_scores, item_means
from jlora.train.settings import SharedConfig, at_least
from jlora.train.step import Batch, Metrics, Objective, Report
from jlora.types import Params

PANELS = (
    ("Rewards", ("rewards/chosen", "rewards/rejected")),
    ("KL", ("kl",)),
    ("Reward margin", ("rewards/margins",)),
)


@dataclasses.dataclass(frozen=True)
class KTOConfig:
    """Kahneman-Tversky optimisation on answers labelled good or bad (Ethayarajh et al. 2024).

    Attributes:
        loss_type: "kto" judges an answer relative to the policy's KL to the reference, "apo_zero_unpaired" to 0.
        beta: strength of the pull towards the reference policy.
        desirable_weight: weight of the good answers' losses.
        undesirable_weight: weight of the bad answers' losses.
    """

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        raise_all(at_least("kto", self, beta=1e-12, desirable_weight=0, undesirable_weight=0))


def objective(model: Model, config: SharedConfig, *, chunk: int = 512) -> Objective:
    """KTO's loss, averaged over the answers of a step.

    With loss_type "kto", the batch holds a second document for each item, its prompt with another item's answer, from
    which the KL is estimated.
    """
    settings = config.kto
    sides = 2 if settings.loss_type == "kto" else 1

    def loss(
        trainable: Params, frozen: Params, batch: Batch, totals: Metrics, key: jax.Array | None
    ) -> tuple[jax.Array, Report]:
        params = lora.combine(frozen["policy"], trainable)
        scores = completion_scores(model, params, batch, key=key, remat=config.train.remat, chunk=chunk)
        with_reference = completion_scores(model, reference_params(frozen), batch, chunk=chunk)
        slots, items, label = batch["items"].shape[0], batch["items"], batch["label"]
        policy = by_document(scores.log_probs, batch["documents"], sides * slots)
        reference = jax.lax.stop_gradient(by_document(with_reference.log_probs, batch["documents"], sides * slots))
        kl = jnp.float32(0)
        if sides == 2:
            kl = losses.kto_kl(policy[slots:], reference[slots:], items)
        per_answer = losses.kto(
            policy[:slots],
            reference[:slots],
            label > 0,
            items,
            kl=kl,
            loss_type=settings.loss_type,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )
        answers = batch["weights"] * (batch["documents"] < slots)
        logits = by_document(scores.mean_logits * answers, batch["documents"], slots)
        tokens = by_document(answers, batch["documents"], slots)
        sums = {"entropy": jnp.sum(scores.entropy * answers), "weight": jnp.sum(answers)}
        of_items = {
            "items": items,
            "chosen": items * label,
            "rejected": items * (1 - label),
            "rewards": settings.beta * (policy[:slots] - reference[:slots]),
            "logps": policy[:slots],
            "logits": logits,
            "tokens": tokens,
            "kl": jnp.broadcast_to(kl, items.shape),
        }
        return jnp.sum(per_answer) / totals["items"], Report(sums, of_items)

    return Objective(loss, lambda batch: {"items": jnp.maximum(jnp.sum(batch["items"]), 1)})


def report(metrics: Metrics) -> Numbers:
    """The numbers that TRL logs for a step on labelled answers, without those of a label that the step lacks."""
    entropy = float(metrics["entropy"]) / max(float(metrics["weight"]), 1.0)
    numbers = {"entropy": entropy} | item_means(metrics, ("kl",))
    for side in ("chosen", "rejected"):
        marked = metrics[side] > 0
        if marked.any():
            means = item_means(metrics, ("rewards", "logps"), side)
            tokens = float(np.sum(metrics["tokens"][marked]))
            numbers |= {f"{name}/{side}": value for name, value in means.items()}
            numbers[f"logits/{side}"] = float(np.sum(metrics["logits"][marked])) / max(tokens, 1.0)
    if "rewards/chosen" in numbers and "rewards/rejected" in numbers:
        numbers["rewards/margins"] = numbers["rewards/chosen"] - numbers["rewards/rejected"]
    return numbers


def _arrange(config: SharedConfig) -> data.Arrange:
    """For the estimate of the KL, each item gets a second document: its prompt with another item's answer."""
    if config.kto.loss_type != "kto":
        return iter
    return functools.partial(data.with_mismatched, batch_size=config.train.batch_size, seq_len=config.train.seq_len)


KTO = judged.algorithm(
    judged.Method(
        "unpaired",
        objective,
        report,
        PANELS,
        arrange=_arrange,
        arranged=lambda config: config.train.batch_size if config.kto.loss_type == "kto" else None,
        reference=lambda config, items: reference_name(config),
        values=lambda config: {"label": 1.0},
    ),
    {"kto": KTOConfig},
)
