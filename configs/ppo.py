"""PPO: a policy and a value on one frozen base, rewarded by a reward model or by functions.

    jlora train --config=ppo --config.model.path=MODEL --config.model.adapter=runs/sft/adapter \
        --config.data.path=PROMPTS.jsonl --config.rollout.rewards="('model',)" \
        --config.rollout.reward_model=runs/reward/adapter --config.train.steps=400

Requires model.path, data.path, rollout.rewards, train.steps.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """One completion a prompt, and a KL coefficient that adapts."""
    config = default_config()
    config.algorithm = "ppo"
    config.optim.learning_rate = 3e-5
    config.optim.schedule = "constant"
    config.rollout.num_generations = 1
    config.ppo.target_kl = 6.0
    config.train.batch_size = 32
    return config
