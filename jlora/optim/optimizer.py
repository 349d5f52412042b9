"""The optimizer of a run: the named rule, and what is the same for all of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from jlora import lora
from jlora.lora.kinds import leaf_of
from jlora.lora.kinds.copies import describe
from jlora.lora.kinds.dora import MAGNITUDE
from jlora.optim.averaging import averaged
from jlora.optim.config import OptimConfig
from jlora.optim.narrow import FORMS
from jlora.optim.rules import OPTIMIZERS
from jlora.optim.schedules import learning_rate
from jlora.types import Params


def make_optimizer(
    config: OptimConfig,
    steps: int,
    rate: float | jax.Array | None = None,
    *,
    trained: Callable[[str], bool] = lora.is_trainable,
    weights: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Clipping by global norm, then the named rule for what is trained; other leaves are never updated.

    Args:
        rate: factor of the learning rate, for adapters side by side; None leaves it and the state without one.
        trained: (path) → whether the leaf is trained; default: adapters' weights.
        weights: how 16-bit weights take updates (`jlora.lora.FullConfig.weights`); None: all are float32.
        seed: of stochastic rounding.

    Returns:
        A transformation of gradients, taken at `gradient_point`, into updates.
    """
    rule = OPTIMIZERS[config.name]
    schedule = learning_rate(config, steps)

    def decay(updates: Params, params: Params) -> Params:
        def pull(yes: bool, update: jax.Array, leaf: jax.Array) -> jax.Array:
            return update + config.weight_decay * leaf if yes else update

        return jax.tree.map(pull, _decays(config, updates), updates, params)

    def named(ratio: float) -> optax.GradientTransformation:
        return optax.chain(
            rule.scale(**{name: getattr(config, name) for name in rule.settings}),
            # Not optax.adamw(mask=…): its state has another structure, and older checkpoints would not open.
            optax.stateless(decay),
            optax.scale_by_learning_rate(lambda step: schedule(step) * ratio),
        )

    by_label = {"lora_a": named(1.0), "lora_b": named(config.loraplus_lr_ratio), "frozen": optax.set_to_zero()}
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    optimizer = optax.chain(clip, optax.partition(by_label, functools.partial(lora.labels, trained=trained)))
    if rate is not None:
        optimizer = optax.chain(optimizer, optax.scale(rate))
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
