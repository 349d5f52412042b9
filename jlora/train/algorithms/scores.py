"""A model's scores of a batch's completions, for every objective on whole documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jlora import lora, sharding
from jlora.losses import TokenScores, by_document, token_scores
from jlora.models import Model
from jlora.train.algorithms.algorithm import Base, Numbers, reference_params
from jlora.train.settings import SharedConfig
from jlora.train.step import Batch, Metrics
from jlora.types import Params


def completion_scores(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    weights: jax.Array | None = None,
    key: jax.Array | None = None,
    remat: bool | str = False,
    chunk: int = 512,
    temperature: int | float | jax.Array = 1.0,
) -> TokenScores:
    """The scores [B, T] of every completion token of a micro-batch.

    Args:
        weights: weights of the tokens to score, [B, T]; None: those of the completions.
    """
    hidden, _ = model.hidden(params, batch["tokens"], batch["positions"], batch["segment_ids"], key=key, remat=remat)
    return token_scores(
        model.project,
        model.head(params),
        hidden,
        batch["targets"],
        batch["weights"] if weights is None else weights,
        chunk=chunk,
        temperature=temperature,
    )


def token_sums(scores: TokenScores, batch: Batch) -> Metrics:
    """Sums over the completion tokens of pairs, and over those of chosen (0) and rejected (1) answers separately."""
    slots, weights = batch["items"].shape[0], batch["weights"]
    sums = {"entropy": jnp.sum(scores.entropy * weights), "weight": jnp.sum(weights)}
    for name, values in {"logits": scores.mean_logits, "correct": scores.correct, "tokens": 1.0}.items():
        by_side = by_document(values * weights, batch["documents"], 2 * slots).reshape(2, slots).sum(axis=1)
        sums |= {f"{name}/{side}": by_side[side] for side in range(2)}
    return sums


def token_means(metrics: Metrics) -> Numbers:
    """The numbers that TRL logs, from `token_sums`; the accuracy is that of the chosen answers."""

    def mean(name: str, count: str) -> float:
        return float(metrics[name]) / max(float(metrics[count]), 1.0)

    return {
        "entropy": mean("entropy", "weight"),
        "mean_token_accuracy": mean("correct/0", "tokens/0"),
        "logits/chosen": mean("logits/0", "tokens/0"),
        "logits/rejected": mean("logits/1", "tokens/1"),
    }


def item_means(metrics: Metrics, names: tuple[str, ...], mask: str = "items") -> Numbers:
    """The means of arrays [A, N] over the items that the mask marks; NaN if it marks none."""
    marked = np.asarray(metrics[mask]) > 0
    return {name: float(np.mean(np.asarray(metrics[name])[marked])) if marked.any() else np.nan for name in names}


def score_batch(
    base: Base, config: SharedConfig, trainable: Params, batch: Metrics, *, old: bool, reference: bool
) -> Metrics:
    """`old_log_probs` and `reference_log_probs` [A, B, T] of a rollout, computed by the forward pass of training.

    Args:
        trainable: the policy's adapter.
        old, reference: whether to compute each of them.
    """
    found = {}
    arrays = sharding.put_batch(batch, base.mesh)
    temperature = config.rollout.temperature
    if old:
        params = lora.combine(base.frozen, trainable)
        found["old_log_probs"] = np.asarray(_log_probs(base.model, params, arrays, temperature))
    if reference:
        params = reference_params(base.constants)
        found["reference_log_probs"] = np.asarray(_log_probs(base.model, params, arrays, temperature))
    return found


@functools.partial(sharding.jit, static_argnums=(0,))
def _log_probs(model: Model, params: Params, batch: Batch, temperature: int | float | jax.Array) -> jax.Array:
    def micro(rows: Batch) -> jax.Array:
        return completion_scores(model, params, rows, temperature=temperature).log_probs

    return jax.lax.map(micro, batch)
