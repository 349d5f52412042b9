"""The settings of a run: from recipes and the command line to frozen dataclasses."""

from jlora.train.config.run import (
    TASK,
    ModelSource,
    RunConfig,
    TrainConfig,
    completed,
    default_config,
    resolve,
    to_dict,
)

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
