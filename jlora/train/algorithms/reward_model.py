"""Reward models: an adapter and a scalar head that learn which of two answers is better."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jlora import data, hub, lora, losses, sharding
from jlora.errors import UserError, raise_all
from jlora.losses.documents import by_document, last_token
from jlora.models import Model
from jlora.train.algorithms import judged
from jlora.train.algorithms.algorithm import Base, Numbers
from jlora.train.algorithms.pairs import pair_totals
from jlora.train.reporting.metrics import can_plot, new_figure, save_figure, style
from jlora.train.settings import SharedConfig, at_least
from jlora.train.step import Batch, Metrics, Objective, Report
from jlora.types import Params

CALIBRATION = "calibration.png"
BINS = 10
PANELS = (
    ("Accuracy", ("accuracy",)),
    ("Reward", ("min_reward", "mean_reward", "max_reward")),
    ("Margin", ("margin",)),
)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """A reward model on pairs (Bradley and Terry 1952), with a margin where the data has one.

    Attributes:
        center_rewards_coefficient: weight of (chosen + rejected)², which keeps rewards near 0 (Eisenstein et al. 2023).
        sft_coefficient: weight of the chosen answers' mean negative log-likelihood under the model's own head: a model
            that still writes the answers judges unseen ones better (Yang et al. 2024, "Regularizing Hidden States …").
    """

    center_rewards_coefficient: float | None = None
    sft_coefficient: float = 0.0

    def __post_init__(self) -> None:
        bounds = dict(sft_coefficient=0.0)
        if self.center_rewards_coefficient is not None:
            bounds["center_rewards_coefficient"] = 0.0
        raise_all(at_least("reward", self, **bounds))


def objective(model: Model, config: SharedConfig) -> Objective:
    """What a run with algorithm="reward" minimises; see `reward_loss`."""
    return reward_loss(model, config.reward, remat=config.train.remat)


def reward_loss(model: Model, settings: RewardConfig, *, remat: bool | str = True, chunk: int = 512) -> Objective:
    """The Bradley-Terry loss, averaged over the pairs of a step; it uses the data's "margin" if there is one."""

    def loss(
        trainable: Params, frozen: Params, batch: Batch, totals: Metrics, key: jax.Array | None
    ) -> tuple[jax.Array, Report]:
        params = lora.combine(frozen["policy"], trainable)
        slots = batch["items"].shape[0]
        hidden = _hidden(model, params, batch, key=key, remat=remat)
        rewards = _at_the_end(model, params, hidden, batch, 2 * slots)
        chosen, rejected = rewards[:slots], rewards[slots:]
        per_pair = losses.reward_model(
            chosen,
            rejected,
            batch["items"],
            margin=batch.get("margin"),
            center_rewards_coefficient=settings.center_rewards_coefficient,
        )
        value, sums = jnp.sum(per_pair) / totals["items"], {}
        if settings.sft_coefficient:
            weights = batch["weights"] * (batch["documents"] < slots)
            scores = losses.token_scores(
                model.project, model.head(params), hidden, batch["targets"], weights, chunk=chunk
            )
            sums = {"nll": -jnp.sum(scores.log_probs), "chosen_tokens": jnp.sum(weights)}
            value = value + settings.sft_coefficient * sums["nll"] / totals["chosen_tokens"]
        return value, Report(sums, {"items": batch["items"], "chosen": chosen, "rejected": rejected})

    return Objective(loss, pair_totals)


def document_rewards(model: Model, params: Params, batch: Batch, count: int) -> jax.Array:
    """The score head's output at the last token of each document, float32 [count]."""
    return _at_the_end(model, params, _hidden(model, params, batch), batch, count)


def _hidden(
    model: Model, params: Params, batch: Batch, *, key: jax.Array | None = None, remat: bool | str = False
) -> jax.Array:
    rows = batch["tokens"], batch["positions"], batch["segment_ids"]
    return model.hidden(params, *rows, key=key, remat=remat)[0]


def _at_the_end(model: Model, params: Params, hidden: jax.Array, batch: Batch, count: int) -> jax.Array:
    last = last_token(batch["documents"], count)
    return by_document(model.score(params, hidden) * last, batch["documents"], count)


def report(metrics: Metrics) -> Numbers:
    """The numbers that TRL logs for a step, and "nll_loss" if the chosen answers' likelihood is part of the loss."""
    marked = np.asarray(metrics["items"]) > 0
    chosen, rejected = (np.asarray(metrics[side])[marked] for side in ("chosen", "rejected"))
    both = np.concatenate([chosen, rejected])
    if "nll" in metrics:
        nll = {"nll_loss": float(metrics["nll"]) / max(float(metrics["chosen_tokens"]), 1.0)}
    else:
        nll = {}
    return nll | {
        "accuracy": float(np.mean(chosen > rejected)),
        "margin": float(np.mean(chosen - rejected)),
        "min_reward": float(both.min()),
        "mean_reward": float(both.mean()),
        "max_reward": float(both.max()),
    }


class RewardModel:
    """The reward model `rollout.reward_model` on the policy's base: the same arrays with another adapter.

    Raises:
        ValueError: the adapter does not fit, or has no score head.
    """

    def __init__(self, base: Base, config: SharedConfig) -> None:
        path = config.rollout.reward_model
        params = hub.load_adapter(lora.strip(base.frozen), path)
        if "score" not in params:
            raise UserError(f'{path} has no score head: expected an adapter that algorithm="reward" left')
        self._base, self._config = base, config
        self._params = sharding.shard(params, base.mesh)
        self._tail = np.array(data.template_tail(base.tokenizer), np.int32)

    def __call__(self, items: Sequence[data.Item], ended: Sequence[bool], prompts: Sequence[int]) -> np.ndarray:
        """The scores of prompts with their completions, float32 [N].

        Args:
            ended: whether each answer is a finished message: if so, what the template writes after a message is
                appended to it, as in training.
            prompts: a number for each item; neighbours with the same number have the same prompt.
        """
        whole = [self._finished(item) if end else item for item, end in zip(items, ended, strict=True)]
        config = self._config
        longest, ways = config.train.seq_len + len(self._tail), sharding.token_ways(self._base.mesh)
        batches = data.in_order(
            whole,
            seq_len=-(-longest // ways) * ways,
            batch_size=config.train.batch_size,
            bucket=config.data.bucket,
            share=config.data.share_prompts,
            prompts=prompts,
        )
        found = []
        for batch in batches:
            scores = _rewards(self._base.model, self._params, sharding.put_batch(batch, self._base.mesh))
            found.append(np.asarray(scores)[batch["items"][0] > 0])
        return np.concatenate(found)

    def _finished(self, item: data.Item) -> data.Item:
        [document] = item.documents
        tokens = np.concatenate([document.tokens, self._tail])
        return dataclasses.replace(item, documents=(data.Example(tokens, np.zeros(len(tokens), np.bool_)),))


@functools.partial(sharding.jit, static_argnums=(0, 3))
def _rewards(model: Model, params: Params, batch: Batch, sides: int = 1) -> jax.Array:
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    return document_rewards(model, params, rows, sides * rows["items"].shape[0])


def compare(
    model: Model, params: Params, items: Sequence[data.Item], *, batch_size: int = 8, seq_len: int = 512
) -> Metrics:
    """The rewards of pairs, "chosen" and "rejected", with "items" > 0 where a pair is not padding; all [A, N]."""
    found = []
    for batch in data.in_order(items, seq_len=seq_len, batch_size=batch_size):
        scores = np.asarray(_rewards(model, params, batch, 2)).reshape(2, -1)
        found.append((batch["items"][0], *scores))
    return dict(zip(("items", "chosen", "rejected"), map(np.stack, zip(*found, strict=True)), strict=True))


def calibration(margins: np.ndarray, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean predicted probability that the first answer is better, share of pairs where it is, pairs) for each bin.

    Every pair is counted in both orders, so that the predictions cover 0 to 1; empty bins are left out.
    """
    both = np.concatenate([margins, -margins])
    better = np.concatenate([np.ones_like(margins), np.zeros_like(margins)])
    predicted = 1 / (1 + np.exp(-both))
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    found = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            found.append((float(predicted[inside].mean()), float(better[inside].mean()), int(inside.sum())))
    return found


def plot_calibration(base: Base, metrics: Metrics) -> None:
    """Writes calibration.png: how often an answer is the better one, against the predicted probability of that."""
    if jax.process_index() or not can_plot():
        return
    draw_calibration(base.workdir / CALIBRATION, metrics)


def draw_calibration(path: pathlib.Path, metrics: Metrics) -> None:
    """Draws the calibration and the margins of these rewards, and writes them as a PNG."""
    marked = np.asarray(metrics["items"]) > 0
    margins = (np.asarray(metrics["chosen"]) - np.asarray(metrics["rejected"]))[marked]
    found = calibration(margins)
    figure, (left, right) = new_figure(1, 2, (10, 4.2))
    style(left, f"Calibration on {len(margins)} held-out pairs")
    left.plot([0, 1], [0, 1], color="#999999", linewidth=0.9, linestyle="--")
    left.plot([x for x, _, _ in found], [y for _, y, _ in found], "o-", color="#2563a8", linewidth=1.6)
    left.set_xlabel("predicted probability of being the better answer")
    left.set_ylabel("share that is")
    style(right, f"Margins: {np.mean(margins > 0):.0%} are above 0")
    right.hist(margins, bins=30, color="#2563a8")
    right.axvline(0, color="#d9641e", linewidth=1.2)
    right.set_xlabel("reward of chosen - reward of rejected")
    save_figure(figure, path)


REWARD = judged.algorithm(
    judged.Method("pairs", objective, report, PANELS, finish=plot_calibration), {"reward": RewardConfig}, scores=True
)
