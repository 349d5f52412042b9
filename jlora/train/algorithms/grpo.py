"""GRPO and its relatives: a completion is judged by how much better it is than others for the same prompt."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlora import data, lora, losses
from jlora.errors import number_of, raise_all
from jlora.generate import policy_digest
from jlora.losses import POLICY_LOSS_TYPES, advantages, by_document
from jlora.models import Model
from jlora.train.algorithms import layout, rollout
from jlora.train.algorithms.algorithm import Algorithm, Base, Job, Note, Numbers, Plan, Source, reference_params
from jlora.train.algorithms.files import FileSource
from jlora.train.algorithms.prompts import read_prompts
from jlora.train.algorithms.rollout import RolloutConfig, Rollouts, RolloutSource, Sampler
from jlora.train.algorithms.scores import completion_scores, score_batch
from jlora.train.settings import SharedConfig, at_least
from jlora.train.state import TrainState
from jlora.train.step import Batch, Metrics, Objective, Report
from jlora.types import Params

BY_PROMPT = "dapo_prompt"  # DAPO's clipping, averaged as its formula says; TRL's "dapo" averages over all tokens
PANELS = (
    ("Reward", ("reward",)),
    ("Completion length", ("completions/mean_length",)),
    ("Groups of equal rewards", ("frac_reward_zero_std",)),
)


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Group-relative policy optimisation (Shao et al. 2024) and its relatives, which the recipe `grpo` has by name.

    Attributes:
        loss_type: how tokens are clipped and averaged (`jlora.losses.policy` has the formulas).
        beta: weight of the KL to the reference policy; 0 uses no reference.
        num_iterations: optimizer steps on every batch of rollouts (times `steps_per_generation`).
        steps_per_generation: a rollout holds the completions of this many steps.
        epsilon: the ratio is clipped at 1 - epsilon below, and at 1 + epsilon above unless `epsilon_high` is given.
        epsilon_high: the ratio is clipped at 1 + epsilon_high above; with "cispo", at epsilon_high itself.
        delta: a bound of the ratio where the advantage is negative too; None: it has none there.
        sapo_temperature_pos: with "sapo", how fast tokens of a positive advantage lose weight.
        sapo_temperature_neg: with "sapo", how fast tokens of a negative advantage lose weight.
        importance_sampling_level: the ratio of a "token", of the "sequence" (its mean: GSPO), or "sequence_sum" (RLOO).
        advantage: what a reward is compared with: "group", "leave_one_out" (RLOO), "reinforce++" or
            "reinforce++_baseline".
        scale_rewards: divide advantages by the deviation of the "group" or the "batch", or not ("none": Dr. GRPO).
        normalize_advantages: normalise "leave_one_out" advantages over the batch.
        multi_objective: whether several rewards are summed and then normalised, or the reverse (GDPO).
        kl_in_reward: beta · KL (k1) is subtracted from the reward instead of added to the loss (RLOO, REINFORCE++).
        use_bias_correction_kl: the loss's KL is multiplied by the ratio (DeepSeek-V3.2; TRL's default).
        mask_truncated_completions: completions without a stop token are not trained on.
        dynamic_sampling: replace groups whose rewards are all equal with groups of other prompts, sampled in up to this
            many further rounds (DAPO); 0: never. The numbers reported are those of the groups that are trained on.
        overlong_cache: length of the soft penalty zone before `max_completion_length` (DAPO); 0: no penalty.
    """

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "dapo_prompt", "luspo", "cispo", "sapo"] = "dapo"
    beta: float = 0.0
    num_iterations: int = 1
    steps_per_generation: int = 1
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    importance_sampling_level: Literal["token", "sequence", "sequence_sum"] = "token"
    advantage: Literal["group", "leave_one_out", "reinforce++", "reinforce++_baseline"] = "group"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    normalize_advantages: bool = False
    multi_objective: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    kl_in_reward: bool = False
    use_bias_correction_kl: bool = True
    mask_truncated_completions: bool = False
    dynamic_sampling: int = 0
    overlong_cache: int = 0

    def __post_init__(self) -> None:
        least = dict(beta=0, num_iterations=1, steps_per_generation=1, epsilon=0, dynamic_sampling=0, overlong_cache=0)
        faults = at_least("grpo", self, sapo_temperature_pos=1e-6, sapo_temperature_neg=1e-6, **least)
        if self.loss_type == "cispo" and self.epsilon_high is None:
            faults.append("grpo.epsilon_high: cispo needs it: the largest ratio that counts, such as 5.0")
        if self.normalize_advantages and self.advantage != "leave_one_out":
            faults.append(f"grpo.normalize_advantages: has no effect with grpo.advantage={self.advantage!r}")
        if self.kl_in_reward and not self.beta:
            faults.append("grpo.kl_in_reward: has no effect without grpo.beta")
        if self.advantage.startswith("reinforce++") and self.beta and not self.kl_in_reward:
            faults.append("grpo.beta with REINFORCE++ is a part of the reward: set grpo.kl_in_reward=True")
        if self.kl_in_reward and self.advantage == "group":
            faults.append('grpo.kl_in_reward: expected with "leave_one_out" or "reinforce++", not with "group"')
        raise_all(faults)


def faults(config: SharedConfig) -> list[str]:
    """What is wrong with the settings that no group can see alone."""
    train, sampled, settings = config.train, config.rollout, config.grpo
    found = rollout.faults(config, train.batch_size * train.grad_accum * settings.steps_per_generation)
    if settings.overlong_cache > sampled.max_completion_length:
        found.append(
            f"grpo.overlong_cache is {settings.overlong_cache}: expected at most rollout.max_completion_length = "
            f"{sampled.max_completion_length}"
        )
    if settings.advantage != "reinforce++" and sampled.num_generations < 2:
        found.append(f"rollout.num_generations: found 1, expected 2 or more with {settings.advantage!r} advantages")
    return found


def plan(config: SharedConfig, tokenizer: Any, note: Note) -> Plan:
    """The run on the prompts of `data.path`, or on the task that it names."""
    prompts, held_out, rewards = read_prompts(config, tokenizer, note)

    def start(base: Base) -> Job:
        settings = config.grpo
        sampler = Sampler(
            config, base, rewards, overlong=settings.overlong_cache, masked=settings.mask_truncated_completions
        )
        if settings.beta:
            note(f"the reference policy is {config.model.adapter or 'the base model'}")
        return dataclasses.replace(
            _job(config, base, RolloutSource(config, base, prompts, functools.partial(_collect, sampler, note))),
            evaluate=lambda state: rollout.evaluate(sampler, held_out, state.trainable, int(state.step)),
        )

    longest = prompts.longest + config.rollout.max_completion_length
    return Plan(config.train.steps, start, longest, prompts.checksum, encoded=prompts.encoded)


def fullest(config: SharedConfig) -> Plan:
    """A plan of one step on completions of the maximum length."""
    settings = config.grpo

    def start(base: Base) -> Job:
        batch = layout.fullest(config, base.mesh, settings.steps_per_generation)
        names = ["advantages", *(["old_log_probs"] if _has_moved(settings) else [])]
        names += ["reference_log_probs"] if settings.beta else []
        batch |= dict.fromkeys(names, np.zeros_like(batch["weights"]))
        if settings.loss_type == BY_PROMPT:
            batch |= _group_values(batch, config.rollout.num_generations)
        batches = iter(layout.parts(batch, settings.steps_per_generation))
        return _job(config, base, FileSource(batches, base.mesh))

    return Plan(1, start, config.train.seq_len)


def _job(config: SharedConfig, base: Base, source: Source) -> Job:
    return Job(
        trainable=base.trainable,
        frozen=base.constants,
        objective=grpo_loss(base.model, config),
        source=source,
        report=functools.partial(_report, config),
        adapters=lambda trainable: {"adapter": lora.combine(base.frozen, trainable)},
        panels=PANELS,
    )


def grpo_loss(model: Model, config: SharedConfig, *, chunk: int = 512) -> Objective:
    """The policy-gradient loss of a step, with the clipping, averaging and KL of `config.grpo`.

    The batch must hold "advantages" and "sampler_log_probs" [A, B, T], "old_log_probs" if the policy may have moved
    since the rollout, and "group_tokens" and "prompts" if tokens are averaged within each prompt.
    """
    settings, temperature = config.grpo, config.rollout.temperature
    kl_in_loss = settings.beta and not settings.kl_in_reward

    def loss(
        trainable: Params, frozen: Params, batch: Batch, totals: Metrics, key: jax.Array | None
    ) -> tuple[jax.Array, Report]:
        params = lora.combine(frozen["policy"], trainable)
        score = functools.partial(completion_scores, model, batch=batch, chunk=chunk, temperature=temperature)
        scores = score(params, key=key, remat=config.train.remat)
        log_probs, weights, documents = scores.log_probs, batch["weights"], batch["documents"]
        count = batch["items"].shape[0]
        old = batch.get("old_log_probs", jax.lax.stop_gradient(log_probs))
        per_token, low, high = losses.policy_loss(
            log_probs, old, batch["advantages"], weights, documents, count, **_clipping(settings)
        )
        sums = {"low": jnp.sum(low * weights), "high": jnp.sum(high * weights)}
        if kl_in_loss:
            reference = batch.get("reference_log_probs")
            if reference is None:
                reference = jax.lax.stop_gradient(score(reference_params(frozen)).log_probs)
            ratio = None
            if settings.use_bias_correction_kl:
                level = settings.importance_sampling_level
                ratio = losses.ratios(log_probs, old, weights, documents, count, level)
            kl = losses.kl3(reference, log_probs, ratio)
            per_token = per_token + settings.beta * kl
            sums["kl"] = jnp.sum(kl * weights)
        value = losses.aggregate(
            per_token,
            weights,
            documents,
            batch["items"],
            how="prompt_tokens" if settings.loss_type == BY_PROMPT else POLICY_LOSS_TYPES[settings.loss_type][1],
            totals=totals,
            max_completion_length=config.rollout.max_completion_length,
            group_tokens=batch.get("group_tokens"),
        )
        sums |= {"entropy": jnp.sum(scores.entropy * weights), "weight": jnp.sum(weights)}
        return value, Report(sums, _items(trainable, log_probs, low, high, batch))

    return Objective(loss, _totals)


def sampling_items(log_probs: jax.Array, batch: Batch) -> Metrics:
    """How far the training pass's log-probabilities are from the sampler's: the largest distance, and the sum."""
    distance = jnp.abs(log_probs - batch["sampler_log_probs"]) * (batch["weights"] > 0)
    return {"distance/max": jnp.max(distance)[None], "distance/sum": jnp.sum(distance)[None]}


def sampling_numbers(metrics: Metrics) -> Numbers:
    """TRL's sampling/sampling_logp_difference/*, in nats."""
    weight = max(float(np.sum(metrics["weight"])), 1.0)
    return {
        "sampling/sampling_logp_difference/mean": float(np.sum(metrics["distance/sum"])) / weight,
        "sampling/sampling_logp_difference/max": float(np.max(metrics["distance/max"])),
    }


def _clipping(settings: GRPOConfig) -> dict[str, Any]:
    return dict(
        loss_type="dapo" if settings.loss_type == BY_PROMPT else settings.loss_type,
        level=settings.importance_sampling_level,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        delta=settings.delta,
        sapo_temperature_pos=settings.sapo_temperature_pos,
        sapo_temperature_neg=settings.sapo_temperature_neg,
    )


def _items(trainable: Params, log_probs: jax.Array, low: jax.Array, high: jax.Array, batch: Batch) -> Metrics:
    count = batch["items"].shape[0]
    lengths = jnp.maximum(by_document(batch["weights"], batch["documents"], count), 1)
    shares = {
        name: by_document(clipped * batch["weights"], batch["documents"], count) / lengths
        for name, clipped in (("low_share", low), ("high_share", high))
    }
    digest = {"policy_digest": policy_digest(trainable)[None]}
    return shares | digest | {"items": batch["items"]} | sampling_items(log_probs, batch)


def _totals(batch: Batch) -> Metrics:
    """The denominators of the averages, counted over the whole step."""
    return {
        "items": jnp.maximum(jnp.sum(batch["items"]), 1),
        "tokens": jnp.maximum(jnp.sum(batch["weights"]), 1),
        "micro_batches": jnp.maximum(jnp.sum(jnp.any(batch["items"] > 0, axis=-1)), 1).astype(jnp.float32),
        "prompts": jnp.maximum(jnp.sum(batch["prompts"]), 1) if "prompts" in batch else jnp.float32(1),
    }


def _report(config: SharedConfig, metrics: Metrics) -> Numbers:
    weight = max(float(metrics["weight"]), 1.0)
    marked = metrics["items"] > 0
    means = {name: float(metrics[name]) / weight for name in ("entropy", "low", "high")}
    numbers = {
        "entropy": means["entropy"],
        "clip_ratio/low_mean": means["low"],
        "clip_ratio/high_mean": means["high"],
        "clip_ratio/region_mean": means["low"] + means["high"],
        "clip_ratio/low_min": float(np.min(metrics["low_share"][marked], initial=1.0)),
        "clip_ratio/high_max": float(np.max(metrics["high_share"][marked], initial=0.0)),
    }
    kl = {"kl": float(metrics["kl"]) / weight} if "kl" in metrics else {}
    return numbers | kl | sampling_numbers(metrics)


def _collect(sampler: Sampler, note: Note, source: RolloutSource, state: TrainState) -> tuple[list, Numbers, Rollouts]:
    """The batches of one rollout, the numbers to report, and the rollout."""
    config, settings = source.config, source.config.grpo
    group = config.rollout.num_generations
    rollouts, rounds = _sample_groups(sampler, source, state, note)
    seed = (config.train.seed, source.drawn)
    batch = layout.lay_out(rollouts, config, source.base.mesh, settings.steps_per_generation, seed)
    batch["sampler_log_probs"] = layout.to_layout(batch, [c.log_probs for c in rollouts.completions])
    moved = _has_moved(settings)
    scores = score_batch(source.base, config, state.trainable, batch, old=moved, reference=bool(settings.beta))
    batch |= {name: value for name, value in scores.items() if name != "old_log_probs" or moved}
    given, numbers = _advantages(rollouts, batch, settings, group, sampler.weights)
    batch["advantages"] = given
    if settings.loss_type == BY_PROMPT:
        batch |= _group_values(batch, group)
    flat = rollouts.rewards.reshape(-1, group)
    numbers |= rollout.describe(rollouts, group)
    numbers["frac_reward_zero_std"] = float(advantages.zero_std_groups(flat.ravel(), group).mean())
    if settings.dynamic_sampling:
        numbers["dynamic_sampling/rounds"] = float(rounds)
    means = layout.by_item(batch, given) / np.maximum(layout.by_item(batch, batch["weights"]), 1)
    rollout.log_completions(source, int(state.step) + 1, rollouts, reward=rollouts.rewards, advantage=means)
    return layout.parts(batch, settings.steps_per_generation) * settings.num_iterations, numbers, rollouts


def _has_moved(settings: GRPOConfig) -> bool:
    """Whether the log-probabilities under the sampling policy are needed.

    They are if it may move before a step, or if the reward has a KL.
    """
    return settings.num_iterations * settings.steps_per_generation > 1 or settings.kl_in_reward


def _sample_groups(sampler: Sampler, source: RolloutSource, state: TrainState, note: Note) -> tuple[Rollouts, int]:
    """Enough groups for a rollout, and how many rounds of sampling they took.

    Groups whose rewards differ come before those of equal rewards.
    """
    config, group = source.config, source.config.rollout.num_generations
    completions = config.train.batch_size * config.train.grad_accum * config.grpo.steps_per_generation
    wanted, found, rounds = completions // group, [], 0
    while True:
        numbers = [number for number in source.draw(wanted) for _ in range(group)]
        seed = (config.train.seed, source.drawn)
        found.append(sampler(state.trainable, source.prompts, numbers, seed, step=int(state.step)))
        rounds += 1
        everything = rollout.join(found, config.rollout.on_error, group, source.prompts)
        equal = advantages.zero_std_groups(everything.rewards, group)
        if rounds > config.grpo.dynamic_sampling or int((~equal).sum()) >= wanted:
            break
    if config.grpo.dynamic_sampling and (missing := wanted - int((~equal).sum())) > 0:
        note(
            f"after {number_of(rounds, 'round')}, rewards are still equal in {missing} of {number_of(wanted, 'group')}"
        )
    chosen = np.argsort(equal, kind="stable")[:wanted]
    return rollout.choose(everything, chosen, group), rounds


def _advantages(
    rollouts: Rollouts, batch: data.Batch, settings: GRPOConfig, group: int, weights: np.ndarray
) -> tuple[np.ndarray, Numbers]:
    """The advantages [A, B, T], and numbers to report about them."""
    rewards, numbers, kl = rollouts.rewards, {}, np.zeros_like(batch["weights"])
    if settings.kl_in_reward:
        kl = (batch["old_log_probs"] - batch["reference_log_probs"]) * batch["weights"]
        numbers["kl"] = float(kl.sum() / max(batch["weights"].sum(), 1))
    if settings.advantage == "reinforce++":
        scores = layout.spread(batch, rewards)
        return advantages.reinforce_plus_plus(scores, kl, batch["weights"], settings.beta), numbers
    if settings.kl_in_reward:
        rewards = rewards - settings.beta * layout.by_item(batch, kl)
    if settings.advantage == "reinforce++_baseline":
        found = advantages.reinforce_plus_plus_baseline(rewards, group, layout.by_item(batch, batch["weights"]))
    elif settings.advantage == "leave_one_out":
        found = advantages.leave_one_out(rewards, group, normalize=settings.normalize_advantages)
    else:
        values = np.where(np.isnan(rewards)[:, None], np.nan, rollouts.table.values)
        found = advantages.reward_advantages(
            values, weights, group, multi_objective=settings.multi_objective, scale=settings.scale_rewards
        )
    return layout.spread(batch, found), numbers


def _group_values(batch: data.Batch, group: int) -> data.Batch:
    """What averages within each prompt need.

    The tokens of each completion's group, and 1/size each, which adds up to the number of prompts.
    """
    lengths = layout.by_item(batch, batch["weights"])
    tokens = np.repeat(lengths.reshape(-1, group).sum(axis=1), group)
    index = batch["index"].astype(int)
    marked = batch["items"] > 0
    return {
        "group_tokens": np.where(marked, tokens[np.where(marked, index, 0)], 0).astype(np.float32),
        "prompts": (batch["items"] / group).astype(np.float32),
    }


GRPO = Algorithm(plan, fullest, groups={"rollout": RolloutConfig, "grpo": GRPOConfig}, faults=faults, samples=True)
