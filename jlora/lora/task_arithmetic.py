"""Sums of the changes that several training runs made to the same weights: plain, pruned, or by majority of signs."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Sign = Literal["total", "frequency"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How several changes are combined into one.

    Attributes:
        prune: which values each change keeps: the largest ("magnitude"), random ones, divided by their share ("random",
            DARE, Yu et al. 2024), or all (None).
        elect: whether only values whose sign is the majority's count (TIES, Yadav et al. 2023).
        average: whether the sum is divided by the sum of the weights that took part in it.
    """

    prune: Literal["magnitude", "random"] | None = None
    elect: bool = False
    average: bool = False


RULES = {
    "linear": Rule(),
    "magnitude_prune": Rule(prune="magnitude"),
    "ties": Rule(prune="magnitude", elect=True, average=True),
    "dare_linear": Rule(prune="random"),
    "dare_ties": Rule(prune="random", elect=True),
}


def add_changes(
    changes: Sequence[Float[np.ndarray, "..."]],
    weights: Sequence[int | float],
    rule: Rule,
    *,
    density: int | float | Sequence[int | float] = 1.0,
    majority_sign_method: Sign = "total",
    generator: np.random.Generator | None = None,
    as_peft: bool = False,
) -> Float[np.ndarray, "..."]:
    """Combines several changes into one, by the formulas of the papers.

    These agree with mergekit's `generalized_task_arithmetic` except for DARE's factor: 1 / density here, what keeps the
    sum of absolute values there.

    The majority is taken over the weighted changes, by their sum ("total") or by number ("frequency").

    Args:
        density: the share of values that pruning keeps: one for all changes, or one for each.
        as_peft: use PEFT's definitions (`peft.utils.merge_utils`): the majority is taken over the unweighted changes,
            and with `rule.elect` the sum is divided by how many changes took part.
    """
    densities = density if isinstance(density, Sequence) else [density] * len(changes)
    pruned = np.stack(
        [_pruned(change, rule, share, generator) for change, share in zip(changes, densities, strict=True)]
    )
    column = np.array(weights, np.float32).reshape(-1, *(1,) * (pruned.ndim - 1))
    weighted = pruned * column
    if rule.elect:
        agreeing = _majority(pruned if as_peft else weighted, majority_sign_method)
    else:
        agreeing = np.ones((), bool)
    total = (weighted * agreeing).sum(axis=0)
    if as_peft and rule.elect:
        return total / np.maximum(agreeing.sum(axis=0), 1)
    if not rule.average:
        return total
    divisor = (column * agreeing).sum(axis=0)
    return total / np.where(np.abs(divisor) < 1e-8, 1, divisor)


def _pruned(change: np.ndarray, rule: Rule, density: int | float, generator: np.random.Generator | None) -> np.ndarray:
    if rule.prune is None or density >= 1:
        return change
    if rule.prune == "random":
        return np.where(generator.random(change.shape) < density, change / np.float32(density), np.float32(0))
    kept = int(density * change.size)
    places = np.argpartition(-np.abs(change).ravel(), kept - 1)[:kept] if kept else []
    mask = np.zeros(change.size, bool)
    mask[places] = True
    return change * mask.reshape(change.shape)


def _majority(changes: np.ndarray, method: Sign) -> Bool[np.ndarray, "..."]:
    votes = changes if method == "total" else np.sign(changes)
    return np.sign(changes) == np.where(votes.sum(axis=0) >= 0, 1, -1)
