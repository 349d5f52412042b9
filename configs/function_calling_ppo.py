"""PPO of SmolLM2-135M on function calling, with the reward model that function_calling_reward trains.

    jlora train --config=function_calling_ppo --config.model.path=MODEL \
        --config.data.path=runs/quickstart/data/train.jsonl --config.data.eval_path=runs/quickstart/data/test.jsonl \
        --config.model.adapter=runs/quickstart/adapter --config.rollout.reward_model=runs/reward/adapter

Requires model.path, data.path, data.eval_path, rollout.reward_model; model.adapter to start from.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """Rollouts of 32 calls, four per question, with two passes over each.

    An adaptive weight holds the KL near its target.
    """
    config = default_config()
    config.algorithm = "ppo"
    config.rollout.rewards = ("model",)
    config.rollout.num_generations = 4
    config.rollout.max_completion_length = 80
    config.rollout.rows = 32
    config.rollout.eval_size = 32
    config.rollout.eval_temperature = 1.0  # as in training, so that the two rewards can be compared
    config.ppo.num_mini_batches = 1
    config.ppo.num_ppo_epochs = 2
    config.ppo.target_kl = 4.0
    config.ppo.missing_eos_penalty = 1.0
    config.optim.learning_rate = 2e-4
    config.optim.schedule = "constant"
    config.train.steps = 32
    config.train.batch_size = 32
    config.train.seq_len = 640
    config.train.eval_every = 8
    config.train.eval_on_start = True
    config.train.remat = False
    config.data.packing = False
    config.data.bucket = 128
    return config
