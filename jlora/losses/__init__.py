"""Losses: pure functions on arrays."""

from jlora.losses.direct import DPO_LOSS_TYPES, check_dpo, dpo, dpo_rewards
from jlora.losses.documents import by_document, last_token, rank, to_tokens
from jlora.losses.dynamic import dft
from jlora.losses.likelihood import Term, TokenSums, cross_entropy, unchanged
from jlora.losses.log_probs import TokenScores, token_scores
from jlora.losses.policy import (
    AGGREGATIONS,
    LEVELS,
    POLICY_LOSS_TYPES,
    aggregate,
    kl3,
    policy_loss,
    ppo_policy,
    ppo_value,
    ratios,
)
from jlora.losses.preference import (
    CPO_LOSS_TYPES,
    KTO_LOSS_TYPES,
    Pairs,
    cpo,
    cpo_rewards,
    kto,
    kto_kl,
    length_desensitised,
    mean_nll,
    orpo,
    reward_model,
)

__all__ = [
    "AGGREGATIONS",
    "CPO_LOSS_TYPES",
    "DPO_LOSS_TYPES",
    "KTO_LOSS_TYPES",
    "LEVELS",
    "POLICY_LOSS_TYPES",
    "Pairs",
    "Term",
    "TokenScores",
    "TokenSums",
    "aggregate",
    "by_document",
    "check_dpo",
    "cpo",
    "cpo_rewards",
    "cross_entropy",
    "dft",
    "dpo",
    "dpo_rewards",
    "kl3",
    "kto",
    "kto_kl",
    "last_token",
    "length_desensitised",
    "mean_nll",
    "orpo",
    "policy_loss",
    "ppo_policy",
    "ppo_value",
    "rank",
    "ratios",
    "reward_model",
    "to_tokens",
    "token_scores",
    "unchanged",
]
