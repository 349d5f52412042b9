"""PPO: a policy and a value model, two adapters on one frozen base, trained on rewards with a KL penalty."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlora import data, lora, sharding
from jlora.errors import raise_all
from jlora.generate import policy_digest
from jlora.losses import advantages, ppo_policy, ppo_value, token_scores
from jlora.models import Model
from jlora.train.algorithms import layout, rollout
from jlora.train.algorithms.algorithm import Algorithm, Base, Job, Note, Numbers, Plan, Source
from jlora.train.algorithms.files import FileSource
from jlora.train.algorithms.grpo import sampling_items, sampling_numbers
from jlora.train.algorithms.prompts import read_prompts
from jlora.train.algorithms.rollout import RolloutConfig, Rollouts, RolloutSource, Sampler
from jlora.train.algorithms.scores import score_batch
from jlora.train.settings import SharedConfig, at_least
from jlora.train.state import TrainState
from jlora.train.step import Batch, Metrics, Objective, Report
from jlora.types import Params

PANELS = (
    ("Reward", ("reward",)),
    ("KL to the reference", ("objective/kl",)),
    ("Value loss", ("loss/value_avg",)),
)


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation from human feedback (Schulman et al. 2017; Ziegler et al. 2019).

    Attributes:
        num_ppo_epochs: passes over every batch of rollouts.
        num_mini_batches: optimizer steps per pass.
        kl_coef: how much each nat of KL to the reference lowers the reward.
        kl_estimator: the estimate of that KL, "k1" or "k3" (Schulman 2020).
        target_kl: the KL of a completion that the adaptive coefficient aims for; None keeps `kl_coef` constant.
        kl_horizon: completions over which the adaptive coefficient moves.
        vf_coef: weight of the value loss.
        cliprange: the ratio of probabilities is clipped to 1 ± this.
        cliprange_value: values are clipped to this distance from those of the rollout.
        gamma: discount of later rewards.
        lam: decay of later errors of the value in the advantage (GAE's λ, Schulman et al. 2016).
        whiten_rewards: divide the rewards of a rollout by their deviation.
        missing_eos_penalty: subtracted from the score of a completion without a stop token.
    """

    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    target_kl: float | None = None
    kl_horizon: float = 10_000.0
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None

    def __post_init__(self) -> None:
        least = dict(num_ppo_epochs=1, num_mini_batches=1, kl_coef=0, cliprange=0, vf_coef=0, cliprange_value=0)
        faults = at_least("ppo", self, kl_horizon=1e-6, **least)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"ppo.{name}: found {getattr(self, name)}, expected 0 to 1")
        if self.target_kl is not None and self.target_kl <= 0:
            faults.append(f"ppo.target_kl: found {self.target_kl}, expected more than 0, or None")
        raise_all(faults)


def faults(config: SharedConfig) -> list[str]:
    """What is wrong with the settings that no group can see alone."""
    return rollout.faults(config, config.train.batch_size * config.train.grad_accum * config.ppo.num_mini_batches)


def plan(config: SharedConfig, tokenizer: Any, note: Note) -> Plan:
    """The run on the prompts of `data.path`, or on the task that it names."""
    prompts, held_out, rewards = read_prompts(config, tokenizer, note)

    def start(base: Base) -> Job:
        sampler = Sampler(config, base, rewards)
        note(f"the reference policy is {config.model.adapter or 'the base model'}")
        return dataclasses.replace(
            _job(config, base, RolloutSource(config, base, prompts, functools.partial(_collect, sampler))),
            evaluate=lambda state: rollout.evaluate(sampler, held_out, state.trainable["policy"], int(state.step)),
        )

    longest = prompts.longest + config.rollout.max_completion_length
    return Plan(config.train.steps, start, longest, prompts.checksum, encoded=prompts.encoded)


def fullest(config: SharedConfig) -> Plan:
    """A plan of one step on completions of the maximum length."""
    names = ("old_log_probs", "reference_log_probs", "old_values", "advantages", "returns")

    def start(base: Base) -> Job:
        batch = layout.fullest(config, base.mesh, config.ppo.num_mini_batches)
        batch |= dict.fromkeys(names, np.zeros_like(batch["weights"]))
        batches = iter(layout.parts(batch, config.ppo.num_mini_batches))
        return _job(config, base, FileSource(batches, base.mesh))

    return Plan(1, start, config.train.seq_len)


def _job(config: SharedConfig, base: Base, source: Source) -> Job:
    # The value model starts from the policy's adapter, with a head that outputs 0.
    _, value = lora.split(base.model.add_score(lora.combine(base.frozen, base.trainable)))
    return Job(
        trainable={"policy": base.trainable, "value": value},
        frozen=base.frozen,
        objective=ppo_loss(base.model, config),
        source=source,
        report=_report,
        adapters=lambda trainable: {
            "adapter": lora.combine(base.frozen, trainable["policy"]),
            "value": lora.combine(base.frozen, trainable["value"]),
        },
        panels=PANELS,
    )


def ppo_loss(model: Model, config: SharedConfig, *, chunk: int = 512) -> Objective:
    """Clipped policy loss + vf_coef · clipped value loss, each a mean over the completion tokens of a step.

    The batch must hold "old_log_probs", "old_values", "advantages", "returns" and "sampler_log_probs", all [A, B, T].
    """
    settings, temperature = config.ppo, config.rollout.temperature

    def loss(
        trainable: Params, frozen: Params, batch: Batch, totals: Metrics, key: jax.Array | None
    ) -> tuple[jax.Array, Report]:
        keys = (None, None) if key is None else jax.random.split(key)
        rows = batch["tokens"], batch["positions"], batch["segment_ids"]
        weights = batch["weights"]
        params = lora.combine(frozen, trainable["policy"])
        hidden, _ = model.hidden(params, *rows, key=keys[0], remat=config.train.remat)
        scores = token_scores(
            model.project, model.head(params), hidden, batch["targets"], weights, chunk=chunk, temperature=temperature
        )
        values = token_values(model, lora.combine(frozen, trainable["value"]), batch, keys[1], config.train.remat)
        log_ratio = (scores.log_probs - batch["old_log_probs"]) * weights
        ratio = jnp.exp(log_ratio)
        policy_loss, clipped = ppo_policy(ratio, batch["advantages"], clip=settings.cliprange)
        value_loss, value_clipped = ppo_value(
            values, batch["old_values"], batch["returns"], clip=settings.cliprange_value
        )
        of_tokens = {
            "policy": policy_loss,
            "value": value_loss,
            "clipped": clipped,
            "value_clipped": value_clipped,
            "approxkl": 0.5 * log_ratio**2,
            "entropy": scores.entropy,
            "ratio": ratio,
            "ratio_squared": ratio**2,
        }
        sums = {name: jnp.sum(values * weights) for name, values in of_tokens.items()} | {"weight": jnp.sum(weights)}
        total = (sums["policy"] + settings.vf_coef * sums["value"]) / totals["tokens"]
        items = {"policy_digest": policy_digest(trainable["policy"])[None]} | sampling_items(scores.log_probs, batch)
        return total, Report(sums, items)

    return Objective(loss, lambda batch: {"tokens": jnp.maximum(jnp.sum(batch["weights"]), 1)})


def next_coefficient(kl_coef: float, kl: float, settings: PPOConfig, count: int) -> float:
    """The coefficient after a rollout of `count` completions.

    A KL that is not finite leaves it unchanged: it would otherwise stay in it for good.
    """
    if settings.target_kl is None or not math.isfinite(kl):
        return kl_coef
    return advantages.next_kl_coef(kl_coef, kl, settings.target_kl, settings.kl_horizon, count)


def token_values(
    model: Model, params: Params, batch: Batch, key: jax.Array | None = None, remat: bool | str = False
) -> jax.Array:
    """The score head's value [B, T] of the text up to each token; 0 where no completion token follows."""
    rows = batch["tokens"], batch["positions"], batch["segment_ids"]
    hidden, _ = model.hidden(params, *rows, key=key, remat=remat)
    return model.score(params, hidden) * (batch["weights"] > 0)


@functools.partial(sharding.jit, static_argnums=(0,))
def _values(model: Model, params: Params, batch: Batch) -> jax.Array:
    return jax.lax.map(functools.partial(token_values, model, params), batch)


def _collect(sampler: Sampler, source: RolloutSource, state: TrainState) -> tuple[list, Numbers, Rollouts]:
    """The batches of one rollout, the numbers to report, and the rollout."""
    config, settings, base = source.config, source.config.ppo, source.base
    group = config.rollout.num_generations
    completions = config.train.batch_size * config.train.grad_accum * settings.num_mini_batches
    numbers = [number for number in source.draw(completions // group) for _ in range(group)]
    seed = (config.train.seed, source.drawn)
    found = sampler(state.trainable["policy"], source.prompts, numbers, seed, step=int(state.step))
    rollouts = rollout.join([found], config.rollout.on_error, group, source.prompts)
    batch = layout.lay_out(rollouts, config, base.mesh, settings.num_mini_batches, seed)
    batch["sampler_log_probs"] = layout.to_layout(batch, [c.log_probs for c in rollouts.completions])
    known = ~np.isnan(rollouts.rewards)  # completions that could not be judged are not trained on
    batch["weights"] = batch["weights"] * layout.spread(batch, known)
    batch |= score_batch(base, config, state.trainable["policy"], batch, old=True, reference=True)
    value_params = lora.combine(base.frozen, state.trainable["value"])
    batch["old_values"] = np.asarray(_values(base.model, value_params, sharding.put_batch(batch, base.mesh)))
    scores = rollouts.rewards
    if settings.missing_eos_penalty is not None:
        scores = scores - settings.missing_eos_penalty * np.array([not c.finished for c in rollouts.completions])
    kl_coef = source.memory.setdefault("kl_coef", settings.kl_coef)
    found_numbers = _estimate(batch, scores, kl_coef, settings)
    source.memory["kl_coef"] = next_coefficient(kl_coef, found_numbers["objective/kl"], settings, int(known.sum()))
    report = rollout.describe(rollouts, group) | found_numbers | {"objective/kl_coef": kl_coef}
    report["val/num_eos_tokens"] = float(sum(c.finished for c in rollouts.completions))
    rollout.log_completions(source, int(state.step) + 1, rollouts, score=scores)
    steps = [
        part
        for epoch in range(settings.num_ppo_epochs)
        for part in layout.parts(_shuffled(batch, (*seed, epoch)), settings.num_mini_batches)
    ]
    return steps, report, rollouts


def _estimate(batch: data.Batch, scores: np.ndarray, kl_coef: float, settings: PPOConfig) -> Numbers:
    """Adds "advantages" and "returns" to the batch, and returns the numbers that TRL reports as objective/*.

    Args:
        scores: one per completion, NaN if unknown; the tokens of such a completion must weigh nothing in the batch.
    """
    weights, known = batch["weights"], ~np.isnan(scores)
    log_probs = jnp.asarray(batch["old_log_probs"])
    kl = advantages.kl_estimate(log_probs, jnp.asarray(batch["reference_log_probs"]), settings.kl_estimator)
    kl = np.asarray(kl) * weights
    counted = jnp.asarray(weights)
    rewards = jnp.asarray(advantages.token_rewards(layout.spread(batch, scores), kl, weights, kl_coef))
    if settings.whiten_rewards:
        rewards = advantages.whiten(rewards, counted, shift_mean=False)
    found, returns = advantages.gae(rewards, jnp.asarray(batch["old_values"]), counted, settings.gamma, settings.lam)
    batch["advantages"] = np.asarray(advantages.whiten(found, counted))
    batch["returns"] = np.asarray(returns)
    of_items = {
        "kl": layout.by_item(batch, kl),
        "entropy": layout.by_item(batch, -batch["old_log_probs"] * weights),
        "scores": scores,
    }
    of_items["non_score_reward"] = -kl_coef * of_items["kl"]
    of_items["rlhf_reward"] = of_items["non_score_reward"] + scores
    return {
        f"objective/{name}": float(np.mean(values[known])) if known.any() else math.nan
        for name, values in of_items.items()
    }


def _shuffled(batch: data.Batch, seed: tuple[int, ...]) -> data.Batch:
    """The micro-batches in another order."""
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).permutation(len(batch["weights"]))
    return {name: leaf[order] for name, leaf in batch.items()}


def _report(metrics: Metrics) -> Numbers:
    weight = max(float(metrics["weight"]), 1.0)
    mean = {name: float(metrics[name]) / weight for name in metrics if np.ndim(metrics[name]) == 0}
    return {
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipped"],
        "policy/entropy_avg": mean["entropy"],
        "loss/policy_avg": mean["policy"],
        "loss/value_avg": mean["value"],
        "val/clipfrac_avg": mean["value_clipped"],
        "val/ratio": mean["ratio"],
        "val/ratio_var": mean["ratio_squared"] - mean["ratio"] ** 2,
    } | sampling_numbers(metrics)


PPO = Algorithm(
    plan,
    fullest,
    groups={"rollout": RolloutConfig, "ppo": PPOConfig},
    faults=faults,
    samples=True,
    policy=("policy",),  # beside the value model's adapter
)
