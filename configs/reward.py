"""A reward model: an adapter and a scalar head, trained on pairs of answers.

    jlora train --config=reward --config.model.path=MODEL --config.data.path=PAIRS.jsonl --config.train.epochs=1

Requires model.path, data.path, train.steps or train.epochs.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """Rewards are held near 0, so that they can be compared between prompts."""
    config = default_config()
    config.algorithm = "reward"
    config.optim.learning_rate = 1e-4
    config.reward.center_rewards_coefficient = 0.01
    return config
