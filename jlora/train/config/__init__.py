"""The settings of a run: from recipes and the command line to frozen dataclasses."""

from jlora.train.config.run import OWN, RunConfig, completed, default_config, resolve, to_dict
from jlora.train.config.sweep import swept
from jlora.train.settings import TASK, ModelSource, TrainConfig

__all__ = [
    "OWN",
    "TASK",
    "ModelSource",
    "RunConfig",
    "TrainConfig",
    "completed",
    "default_config",
    "resolve",
    "swept",
    "to_dict",
]
