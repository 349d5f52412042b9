"""The optimizer: what is trained is updated by a rule that has a name; schedules, clipping, LoRA+, 16-bit weights."""

from jlora.optim.averaging import gradient_point
from jlora.optim.config import OptimConfig
from jlora.optim.optimizer import OWN_SETTINGS, OwnOptim, global_norm, make_optimizer, own_optim
from jlora.optim.schedules import learning_rate, learning_rates

__all__ = [
    "OWN_SETTINGS",
    "OptimConfig",
    "OwnOptim",
    "global_norm",
    "gradient_point",
    "learning_rate",
    "learning_rates",
    "make_optimizer",
    "own_optim",
]
