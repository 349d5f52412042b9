"""Learning rates by step."""

import math

import jax
import numpy as np
import optax

from jlora.optim.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """step → learning rate, for steps counted from 0 to `steps` - 1."""
    peak, least = config.learning_rate, config.min_lr_ratio
    warmup_steps = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    decay_steps = max(1, steps - warmup_steps)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, least * peak, decay_steps)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, decay_steps, alpha=least)
        case "wsd":
            falling = max(1, min(math.ceil(config.decay_ratio * steps), decay_steps))
            fall = optax.cosine_decay_schedule(peak, falling, alpha=least)
            after = optax.join_schedules([optax.constant_schedule(peak), fall], [decay_steps - falling])
    warmup = optax.linear_schedule(0.0, peak, max(1, warmup_steps))
    return optax.join_schedules([warmup, after], [warmup_steps])


def learning_rates(config: OptimConfig, steps: int) -> np.ndarray:
    """`learning_rate` of every step, on the host: computed between steps, each would queue after the next step."""
    return np.asarray(jax.jit(jax.vmap(learning_rate(config, steps)))(np.arange(steps)))
