"""The optimizer of a run: the named rule, and what is the same for all of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jlora import lora
from jlora.lora.kinds import leaf_of
from jlora.lora.kinds.copies import describe
from jlora.lora.kinds.dora import MAGNITUDE
from jlora.optim.averaging import averaged
from jlora.optim.config import OptimConfig
from jlora.optim.narrow import FORMS
from jlora.optim.rules import OPTIMIZERS
from jlora.optim.schedules import learning_rate, learning_rates
from jlora.types import Params

# The settings that `OwnOptim` holds.
OWN_SETTINGS = (
    *("learning_rate", "schedule", "warmup_steps", "warmup_ratio", "min_lr_ratio", "decay_ratio"),
    *("weight_decay", "loraplus_lr_ratio"),
)


class OwnOptim(NamedTuple):
    """What adapters side by side have each for itself of the optimizer: arrays, so that one program serves them all.

    Attributes:
        rates: the learning rate of each step.
    """

    rates: Float[Array, "*K steps"]
    weight_decay: Float[Array, "*K"]
    loraplus_lr_ratio: Float[Array, "*K"]


def own_optim(config: OptimConfig, steps: int) -> OwnOptim:
    """The `OWN_SETTINGS` of an adapter that trains for so many steps."""
    rates = jnp.asarray(learning_rates(config, steps))
    return OwnOptim(rates, jnp.float32(config.weight_decay), jnp.float32(config.loraplus_lr_ratio))


def make_optimizer(
    config: OptimConfig,
    steps: int,
    own: OwnOptim | None = None,
    *,
    trained: Callable[[str], bool] = lora.is_trainable,
    weights: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Clipping by global norm, then the named rule for what is trained; other leaves are never updated.

    Args:
        own: replaces the settings' `OWN_SETTINGS`, for adapters side by side.
        trained: (path) → whether the leaf is trained; default: adapters' weights.
        weights: how 16-bit weights take updates (`jlora.lora.FullConfig.weights`); None: all are float32.
        seed: of stochastic rounding.

    Returns:
        A transformation of gradients, taken at `gradient_point`, into updates.
    """
    rule = OPTIMIZERS[config.name]
    if own is None:
        schedule, weight_decay, ratio_of_b = learning_rate(config, steps), config.weight_decay, config.loraplus_lr_ratio
    else:
        _, weight_decay, ratio_of_b = own

        def schedule(step: jax.Array) -> jax.Array:
            return own.rates.at[step].get(mode="clip")

    def decay(updates: Params, params: Params) -> Params:
        def pull(yes: bool, update: jax.Array, leaf: jax.Array) -> jax.Array:
            return update + weight_decay * leaf if yes else update

        return jax.tree.map(pull, _decays(config, updates), updates, params)

    def named(ratio: float | jax.Array) -> optax.GradientTransformation:
        return optax.chain(
            rule.scale(**{name: getattr(config, name) for name in rule.settings}),
            # Not optax.adamw(mask=…): its state has another structure, and older checkpoints would not open.
            optax.stateless(decay),
            optax.scale_by_learning_rate(lambda step: schedule(step) * ratio),
        )

    by_label = {"lora_a": named(1.0), "lora_b": named(ratio_of_b), "frozen": optax.set_to_zero()}
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    optimizer = optax.chain(clip, optax.partition(by_label, functools.partial(lora.labels, trained=trained)))
    if own is not None:
        optimizer = optax.chain(optimizer, optax.identity())  # the structure that older checkpoints have
    optimizer = averaged(optimizer, schedule, config.b1) if rule.averages else optimizer
    return FORMS[weights](optimizer, seed) if weights else optimizer


def global_norm(tree: dict) -> jax.Array:
    """The l2 norm over all leaves."""
    return optax.tree.norm(tree)


def _decays(config: OptimConfig, params: Params) -> Params:
    """True for every leaf that weight decay pulls towards zero."""

    def decays(path: tuple[jax.tree_util.DictKey, ...], _: Any) -> bool:
        name = path[-1].key
        if name == MAGNITUDE.name and not config.decay_magnitudes:
            return False
        return (leaf_of(name) or describe(name)).decays

    return jax.tree_util.tree_map_with_path(decays, params)
