"""Settings of the algorithms other than supervised fine-tuning, one group each, under TRL's names where it has them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jlora.errors import raise_all
from jlora.losses import check_dpo

ErrorPolicy = Literal["raise", "skip"]


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation and its relatives (Rafailov et al. 2023); `jlora.losses.dpo` has the formulas.

    Args:
        loss_type: one of `jlora.losses.DPO_LOSS_TYPES` or "sft", or several, summed with `loss_weights`.
        beta: strength of the pull towards the reference policy.
        label_smoothing: for losses whose paper has it ("sigmoid" ignores it, as in TRL; "sigmoid_smooth" does not).
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


@dataclasses.dataclass(frozen=True)
class CPOConfig:
    """Contrastive preference optimisation (Xu et al. 2024) and SimPO (Meng et al. 2024), without a reference.

    Args:
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
        faults = _at_least("cpo", self, beta=1e-12, label_smoothing=0, cpo_alpha=0)
        if self.label_smoothing >= 0.5:
            faults.append(f"cpo.label_smoothing: found {self.label_smoothing}, expected less than 0.5")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "simpo"):
            faults.append(f"cpo.label_smoothing: has no effect with cpo.loss_type={self.loss_type!r}")
        if self.simpo_gamma != CPOConfig.simpo_gamma and self.loss_type != "simpo":
            faults.append(f"cpo.simpo_gamma: has no effect with cpo.loss_type={self.loss_type!r}")
        raise_all(faults)


@dataclasses.dataclass(frozen=True)
class ORPOConfig:
    """Odds-ratio preference optimisation (Hong et al. 2024).

    Args:
        beta: weight of the odds-ratio term (lambda in the paper).
        nll_on_prompt: the likelihood term also counts the prompt's tokens, as in TRL, rather than the answer's alone.
    """

    beta: float = 0.1
    nll_on_prompt: bool = True

    def __post_init__(self) -> None:
        raise_all(_at_least("orpo", self, beta=1e-12))


@dataclasses.dataclass(frozen=True)
class KTOConfig:
    """Kahneman-Tversky optimisation on answers labelled good or bad (Ethayarajh et al. 2024)."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        raise_all(_at_least("kto", self, beta=1e-12, desirable_weight=0, undesirable_weight=0))


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """A reward model on pairs (Bradley and Terry 1952), with a margin where the data has one.

    Args:
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
        raise_all(_at_least("reward", self, **bounds))


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What is sampled from the policy and how it is judged, for "grpo" and "ppo".

    Args:
        num_generations: completions per prompt.
        max_completion_length: in tokens; prompts may have up to `train.seq_len` minus this.
        rows: completions that are sampled at once; finished ones make room for the next.
        rewards: "FILE.py:FUNCTION", "metric:FILE.py:KEY", "reasoning_gym", or "model" for `reward_model`; see
            `jlora.train.rewards.judging`.
        reward_weights: one per reward, default 1.
        reward_model: a PEFT folder with a score head, as saved by `algorithm="reward"`.
        on_error: "raise" ends the run when a reward fails or a whole group is empty; "skip" leaves it out. May be
            changed when a run is resumed.
        task_size: how many questions to draw of the reasoning-gym task that data.path="reasoning_gym:NAME" names.
        task_settings: the task's own settings (needs the extra `tasks`).
        eval_size: how many held-out prompts to evaluate on.
        system_prompt: put before the task's questions.
        num_fewshot: how many solved questions of the task precede each question, always the same ones.
        eval_temperature: of the completions that evaluation judges; 0 takes the likeliest tokens.
        log_completions: how many examples of every rollout go to completions.jsonl.
    """

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rows: int = 32
    rewards: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] | None = None
    reward_model: str | None = None
    on_error: ErrorPolicy = "raise"
    task_size: int = 1000
    task_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eval_size: int = 64
    eval_temperature: float = 0.0
    system_prompt: str | None = None
    num_fewshot: int = 0
    log_completions: int = 4

    def __post_init__(self) -> None:
        least = dict(
            num_generations=1, max_completion_length=1, top_k=0, rows=1, task_size=1, eval_size=1, num_fewshot=0
        )
        faults = _at_least("rollout", self, temperature=1e-6, eval_temperature=0, log_completions=0, **least)
        if not 0 < self.top_p <= 1:
            faults.append(f"rollout.top_p: found {self.top_p}, expected a probability in (0, 1]")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            faults.append(
                f"rollout.reward_weights: found {len(self.reward_weights)}, expected one for each of "
                f"{len(self.rewards)} rewards"
            )
        if ("model" in self.rewards) != (self.reward_model is not None):
            faults.append('rollout.reward_model and the reward "model": one is given without the other')
        raise_all(faults)


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Group-relative policy optimisation (Shao et al. 2024) and its relatives; configs/grpo.py has them by name.

    Args:
        loss_type: how tokens are clipped and averaged; see `jlora.losses.policy`.
        beta: weight of the KL to the reference policy; 0 uses no reference.
        num_iterations: optimizer steps on every batch of rollouts (times `steps_per_generation`).
        steps_per_generation: a rollout holds the completions of this many steps.
        epsilon, epsilon_high, delta: bounds of the ratio: 1 - epsilon, 1 + epsilon_high (None: epsilon), and delta
            above; "cispo" bounds it by epsilon_high itself.
        importance_sampling_level: the ratio of a "token", of the "sequence" (its mean: GSPO), or "sequence_sum" (RLOO).
        advantage: "group", "leave_one_out" (RLOO), "reinforce++" or "reinforce++_baseline".
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
        faults = _at_least("grpo", self, sapo_temperature_pos=1e-6, sapo_temperature_neg=1e-6, **least)
        if self.loss_type == "cispo" and self.epsilon_high is None:
            faults.append("grpo.epsilon_high: expected with cispo, the largest ratio that counts, such as 5.0")
        if self.normalize_advantages and self.advantage != "leave_one_out":
            faults.append(f"grpo.normalize_advantages: has no effect with grpo.advantage={self.advantage!r}")
        if self.kl_in_reward and not self.beta:
            faults.append("grpo.kl_in_reward: has no effect without grpo.beta")
        if self.advantage.startswith("reinforce++") and self.beta and not self.kl_in_reward:
            faults.append("grpo.beta with REINFORCE++ is a part of the reward: set grpo.kl_in_reward=True")
        if self.kl_in_reward and self.advantage == "group":
            faults.append('grpo.kl_in_reward: expected with "leave_one_out" or "reinforce++", not with "group"')
        raise_all(faults)


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation from human feedback (Schulman et al. 2017; Ziegler et al. 2019).

    Args:
        num_ppo_epochs: passes over every batch of rollouts.
        num_mini_batches: optimizer steps per pass.
        kl_coef: how much each nat of KL to the reference lowers the reward.
        kl_estimator: "k1" or "k3" (Schulman 2020).
        target_kl: the KL of a completion that the adaptive coefficient aims for; None keeps `kl_coef` constant.
        kl_horizon: completions over which the adaptive coefficient moves.
        vf_coef: weight of the value loss.
        cliprange, cliprange_value: clipping ranges of the ratio and of the values.
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
        faults = _at_least("ppo", self, kl_horizon=1e-6, **least)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"ppo.{name}: found {getattr(self, name)}, expected 0 to 1")
        if self.target_kl is not None and self.target_kl <= 0:
            faults.append(f"ppo.target_kl: found {self.target_kl}, expected more than 0, or None")
        raise_all(faults)


def _at_least(group: str, settings: Any, **bounds: int | float) -> list[str]:
    return [
        f"{group}.{name}: found {value}, expected a number of at least {bound:g}"
        for name, bound in bounds.items()
        if not ((value := getattr(settings, name)) >= bound and math.isfinite(value))
    ]
