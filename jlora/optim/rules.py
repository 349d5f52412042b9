"""The optimizers by name: how each turns gradients into steps of about unit size, and which settings it has.

To add one, add a row. Clipping, weight decay, learning rate and LoRA+ are the same for all and follow in
`jlora.optim.make_optimizer`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import optax

from jlora.optim.blockwise import scale_by_adam_8bit
from jlora.optim.matrices import scale_by_adafactor, scale_by_muon

ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


class Rule(NamedTuple):
    """An optimizer.

    Attributes:
        scale: its settings, by keyword → a transformation from gradients to what is subtracted from the weights at a
            learning rate of 1.
        settings: names and defaults of the settings that not every optimizer has.
        averages: whether the trained weights are an average of those that the updates go through.
    """

    scale: Callable[..., optax.GradientTransformation]
    settings: Mapping[str, float]
    averages: bool = False


def _scale_by_rms(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam without its first moment; `b1` belongs to the averaging that replaces it."""
    del b1
    return optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)


OPTIMIZERS: dict[str, Rule] = {
    "adamw": Rule(optax.scale_by_adam, ADAM),
    "adamw_8bit": Rule(scale_by_adam_8bit, ADAM),
    "adafactor": Rule(scale_by_adafactor, {"eps": 1e-30, "beta2_decay": -0.8, "clip_threshold": 1.0}),
    "lion": Rule(optax.scale_by_lion, {"b1": 0.9, "b2": 0.99}),
    "muon": Rule(scale_by_muon, {"momentum": 0.95, **ADAM}),
    "schedule_free_adamw": Rule(_scale_by_rms, ADAM, averages=True),
}
# Every setting that some optimizers do not have.
OWN = tuple(dict.fromkeys(name for rule in OPTIMIZERS.values() for name in rule.settings))
