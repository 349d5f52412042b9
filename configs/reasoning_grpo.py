"""GRPO of SmolLM2-135M on sums and differences of small numbers, with reasoning-gym's reward; no data is needed.

    jlora train --config=reasoning_grpo --config.model.path=MODEL

Requires model.path; the extra `tasks` (pip install 'jlora[tasks]').
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """Groups of eight short answers, three solved sums before each question."""
    config = default_config()
    config.algorithm = "grpo"
    config.data.path = "reasoning_gym:chain_sum"
    config.data.packing = False
    config.data.bucket = 32
    config.rollout.task_settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    config.rollout.task_size = 60
    config.rollout.eval_size = 20
    config.rollout.system_prompt = "Answer with one number."
    config.rollout.num_fewshot = 3
    config.rollout.max_completion_length = 8
    config.rollout.num_generations = 8
    config.rollout.rows = 64
    config.lora.r = 16
    config.lora.lora_alpha = 32.0
    config.optim.learning_rate = 1e-4
    config.optim.schedule = "constant"
    config.train.steps = 40
    config.train.batch_size = 64
    config.train.seq_len = 256
    config.train.eval_every = 10
    config.train.eval_on_start = True
    config.train.remat = False
    return config
