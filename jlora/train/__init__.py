"""Training: one loop, one jitted step, a loss for each algorithm."""

from jlora.train.config import RunConfig, TrainConfig, default_config, resolve
from jlora.train.finite import Diverged
from jlora.train.loop import Interrupted, run
from jlora.train.state import TrainState, create_state
from jlora.train.step import make_step

__all__ = [
    "Diverged",
    "Interrupted",
    "RunConfig",
    "TrainConfig",
    "TrainState",
    "create_state",
    "default_config",
    "make_step",
    "resolve",
    "run",
]
