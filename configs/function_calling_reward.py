"""A reward model of function calls on SmolLM2-135M, from the pairs that function_calling_dpo learns from.

    jlora train --config=function_calling_reward --config.model.path=MODEL --config.data.path=pairs.jsonl \
        --config.data.eval_path=held_out.jsonl --config.model.adapter=runs/quickstart/adapter

Requires model.path, data.path, data.eval_path; model.adapter to start from.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """Starts from the adapter that has learned the task, and adds a head."""
    config = default_config()
    config.algorithm = "reward"
    config.reward.center_rewards_coefficient = 0.01
    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 4
    config.train.epochs = 1.0
    config.train.batch_size = 4
    config.train.seq_len = 576
    config.train.eval_every = 40
    config.train.remat = False
    config.data.packing = False
    config.data.bucket = 128
    return config
