"""The settings of a run: from recipes and the command line to frozen dataclasses."""

from jlora.train.config.run import RunConfig, completed, default_config, resolve, to_dict
from jlora.train.settings import TASK, ModelSource, TrainConfig

__all__ = [
    "TASK",
    "ModelSource",
    "RunConfig",
    "TrainConfig",
    "completed",
    "default_config",
    "resolve",
    "to_dict",
]
