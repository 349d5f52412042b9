"""The optimizer: AdamW on adapters and no updates elsewhere; schedules, clipping, LoRA+."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from jlora import lora
from jlora.errors import UserError
from jlora.lora.kinds import leaf_of
from jlora.lora.kinds.copies import describe
from jlora.types import Params

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Settings of AdamW.

    Attributes:
        learning_rate: peak rate. LoRA needs about ten times the rate of full fine-tuning ("LoRA Without Regret", 2025).
        schedule: what follows the warm-up: "constant", or "linear" or "cosine" decay to zero at the last step.
        warmup_steps: steps of linear increase from zero.
        weight_decay: decay of matrices; biases and norm scales do not decay, as in transformers' Trainer.
        max_grad_norm: gradients are scaled down to this global norm; 0 turns clipping off.
        loraplus_lr_ratio: rate of B over rate of A (LoRA+, Hayou et al. 2024).
    """

    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    loraplus_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if self.schedule not in SCHEDULES:
            problems.append(f"schedule={self.schedule!r}: expected one of {', '.join(SCHEDULES)}")
        for name in ("learning_rate", "loraplus_lr_ratio", "eps"):
            if getattr(self, name) <= 0:
                problems.append(f"{name}={getattr(self, name)}: expected a positive number")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            if getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)}: expected zero or more")
        problems += [
            f"{name}={getattr(self, name)}: expected [0, 1)"
            for name in ("b1", "b2")
            if not 0 <= getattr(self, name) < 1
        ]
        if problems:
            raise UserError("optim:\n  " + "\n  ".join(problems))


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """step → learning rate, for steps counted from 0 to `steps` - 1."""
    decay_steps = max(1, steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(config.learning_rate)
        case "linear":
            after = optax.linear_schedule(config.learning_rate, 0.0, decay_steps)
        case "cosine":
            after = optax.cosine_decay_schedule(config.learning_rate, decay_steps)
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(1, config.warmup_steps))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def learning_rates(config: OptimConfig, steps: int) -> np.ndarray:
    """`learning_rate` of every step, on the host: computed between steps, each would queue after the next step."""
    return np.asarray(jax.jit(jax.vmap(learning_rate(config, steps)))(np.arange(steps)))


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW on A and B; leaves that are not adapter weights are never updated."""

    def decay(updates: Params, params: Params) -> Params:
        def pull(yes: bool, update: jax.Array, leaf: jax.Array) -> jax.Array:
            return update + config.weight_decay * leaf if yes else update

        return jax.tree.map(pull, _decays(updates), updates, params)

    def adamw(ratio: float) -> optax.GradientTransformation:
        schedule = learning_rate(config, steps)
        return optax.chain(
            optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
            # Not optax.adamw(mask=…): its state has another structure, and older checkpoints would not open.
            optax.stateless(decay),
            optax.scale_by_learning_rate(lambda step: schedule(step) * ratio),
        )

    by_label = {"lora_a": adamw(1.0), "lora_b": adamw(config.loraplus_lr_ratio), "frozen": optax.set_to_zero()}
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    return optax.chain(clip, optax.partition(by_label, lora.labels))


def global_norm(tree: dict) -> jax.Array:
    """The l2 norm over all leaves."""
    return optax.tree.norm(tree)


def _decays(params: Params) -> Params:
    """True for every leaf that weight decay pulls towards zero."""

    def decays(path: tuple[jax.tree_util.DictKey, ...], _: Any) -> bool:
        name = path[-1].key
        return (leaf_of(name) or describe(name)).decays

    return jax.tree_util.tree_map_with_path(decays, params)
