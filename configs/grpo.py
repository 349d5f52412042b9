"""GRPO and its relatives, by name: grpo:NAME.

    jlora train --config=grpo:dr_grpo --config.model.path=MODEL --config.data.path=PROMPTS.jsonl \
        --config.rollout.rewards="('rewards.py:correct',)" --config.train.steps=200

Requires model.path, data.path, rollout.rewards, train.steps. Without a name: TRL's defaults (dapo's token mean,
symmetric clipping, no KL).
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config

VARIANTS = {
    "grpo": dict(loss_type="grpo", beta=0.04, use_bias_correction_kl=False),
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none"),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28, dynamic_sampling=3, overlong_cache=64),
    "dapo_prompt": dict(loss_type="dapo_prompt", epsilon_high=0.28, dynamic_sampling=3, overlong_cache=64),
    "bnpo": dict(loss_type="bnpo"),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "cispo": dict(loss_type="cispo", epsilon_high=5.0),
    "sapo": dict(loss_type="sapo"),
    "rloo": dict(
        loss_type="grpo",
        importance_sampling_level="sequence_sum",
        advantage="leave_one_out",
        beta=0.05,
        kl_in_reward=True,
    ),
    "reinforce_plus_plus": dict(advantage="reinforce++", beta=0.01, kl_in_reward=True),
    "reinforce_plus_plus_baseline": dict(advantage="reinforce++_baseline", beta=0.01, kl_in_reward=True),
}


def get_config(variant: str | None = None) -> ConfigDict:
    """The defaults, changed as the variant says."""
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"{variant!r} is not one of {', '.join(VARIANTS)}")
    config = default_config()
    config.algorithm = "grpo"
    config.optim.learning_rate = 2e-5
    config.optim.schedule = "constant"
    config.train.batch_size = 32
    for name, value in VARIANTS.get(variant, {}).items():
        config.grpo[name] = value
    return config
