"""A reward model: an adapter and a scalar head, trained on pairs of answers.

    jlora train --config=configs/reward.py --config.model.path=MODEL --config.data.path=PAIRS.jsonl \
        --config.train.epochs=1
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """Requires model.path, data.path and train.steps or train.epochs."""
    config = default_config()
    config.algorithm = "reward"
    config.optim.learning_rate = 1e-4
    config.reward.center_rewards_coefficient = 0.01
    return config
