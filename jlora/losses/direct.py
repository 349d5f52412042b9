"""Direct preference optimisation and its relatives: losses on pairs with reference log-probabilities."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.losses.preference import Pairs, mean, of_items, smooth

ALPHA, TAU = 0.5, 0.05


class _Terms(NamedTuple):
    """The terms of DPO's formulas: log-ratios to the reference, and f' of them (the scores)."""

    chosen: jax.Array
    rejected: jax.Array
    chosen_score: jax.Array
    rejected_score: jax.Array
    pairs: Pairs
    beta: float
    smoothing: float
    tau: float

    @property
    def margin(self) -> jax.Array:
        return self.beta * (self.chosen_score - self.rejected_score)

    @property
    def mean_difference(self) -> jax.Array:
        """The difference of the scores per token, without β."""
        return mean(self.chosen_score, self.pairs.chosen_tokens) - mean(self.rejected_score, self.pairs.rejected_tokens)


def dpo(
    pairs: Pairs,
    *,
    loss_type: str,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = ALPHA,
    discopop_tau: float = TAU,
) -> Float[Array, " N"]:
    """The loss of direct preference optimisation for every pair.

    c, r: log(policy / reference) of the chosen and the rejected completion, ε: label_smoothing.

    m = β(f'(c) - f'(r)), where the f-divergence's f' of a log-ratio x (Wang et al., 2023) is x for reverse_kl,
    1 - exp(-x) for forward_kl, log 2 + log σ(x) for js_divergence and (exp((α-1)x) - 1)/(α-1) for alpha_divergence.

    * sigmoid: -log σ(m) (Rafailov et al., 2023). As in TRL, it ignores ε.
    * sigmoid_smooth: -(1-ε) log σ(m) - ε log σ(-m), conservative DPO (Mitchell, 2023).
    * sigmoid_norm: sigmoid of the scores per token, as in LN-DPO (Lambert et al., 2024, Tülu 3).
    * hinge: max(0, 1 - m) (SLiC: Zhao et al., 2023; Liu et al., 2023).
    * ipo: (f'(c)/|chosen| - f'(r)/|rejected| - 1/2β)² (Azar et al., 2023), per token as its authors told TRL.
    * robust: (-(1-ε) log σ(m) + ε log σ(-m)) / (1-2ε) (Chowdhury et al., 2024).
    * exo_pair: KL of (σ(m), σ(-m)) to (1-ε, ε) (Ji et al., 2024).
    * discopop: (1-s)(-log σ(m)) + s exp(-m), s = σ(m/τ) (Lu et al., 2024).
    * nca_pair: -log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr) (Chen et al., 2024).
    * bco_pair: -log σ(βc) - log σ(-βr) (Jung et al., 2024), without the moving reward shift.
    * sppo_hard: (c - 1/2β)² + (r + 1/2β)² (Wu et al., 2024).
    * apo_zero: 1 - σ(βc) + σ(βr); apo_down: σ(βc) + 1 - σ(β(c - r)) (D'Oosterlinck et al., 2024).
    * aot, aot_unpaired: sigmoid_smooth of β times the difference of two sorted lists (Melnyk et al., 2024): the
      policy's and the reference's chosen - rejected, or c and r. An item's loss is the one at its place in the first.
    """
    chosen, rejected = _ratios(pairs)
    score = _DIVERGENCES[f_divergence_type]
    scores = (score(ratio, f_alpha_divergence_coef) for ratio in (chosen, rejected))
    terms = _Terms(chosen, rejected, *scores, pairs, beta, label_smoothing, discopop_tau)
    return of_items(pairs.items, _DPO[loss_type](terms))


def dpo_rewards(pairs: Pairs, *, beta: float) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """DPO's implicit rewards, β log(policy / reference), of chosen and of rejected; no gradient flows."""
    chosen, rejected = jax.lax.stop_gradient(_ratios(pairs))
    return beta * chosen, beta * rejected


def check_dpo(
    loss_types: Sequence[str],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = ALPHA,
    discopop_tau: float = TAU,
) -> list[str]:
    """Faults of settings for a sum of `dpo` losses and "sft" (`mean_nll`), including settings that none would read."""
    names, given = set(loss_types), " + ".join(loss_types)
    rules = (
        (
            names <= {*DPO_LOSS_TYPES, "sft"},
            f"loss_type {given}: expected names among {', '.join((*DPO_LOSS_TYPES, 'sft'))}",
        ),
        (beta > 0, f"beta {beta}: must be above 0"),
        (0 <= label_smoothing < 1, f"label_smoothing {label_smoothing}: must be in [0, 1)"),
        (
            label_smoothing == 0 or names & _SMOOTHED,
            f"label_smoothing {label_smoothing} is not read by {given}; {', '.join(sorted(_SMOOTHED))} do",
        ),
        ("exo_pair" not in names or label_smoothing > 0, "exo_pair needs label_smoothing above 0, such as 1e-3"),
        (
            not names & {"robust", "sigmoid_smooth"} or label_smoothing < 0.5,
            f"label_smoothing {label_smoothing}: must be below 0.5 for robust and sigmoid_smooth",
        ),
        (
            f_divergence_type in _DIVERGENCES,
            f"f_divergence_type {f_divergence_type!r}: expected one of {', '.join(_DIVERGENCES)}",
        ),
        (
            f_divergence_type == "reverse_kl" or names & _DIVERGING,
            f"f_divergence_type {f_divergence_type} is not read by {given}; {', '.join(sorted(_DIVERGING))} do",
        ),
        (
            f_alpha_divergence_coef == ALPHA or f_divergence_type == "alpha_divergence",
            f"f_alpha_divergence_coef {f_alpha_divergence_coef} is read by f_divergence_type alpha_divergence only",
        ),
        (discopop_tau > 0, f"discopop_tau {discopop_tau}: must be above 0"),
        (discopop_tau == TAU or "discopop" in names, f"discopop_tau {discopop_tau} is read by discopop only"),
    )
    return [fault for sound, fault in rules if not sound]


def _ratios(pairs: Pairs) -> tuple[jax.Array, jax.Array]:
    return pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected


def _matched(values: jax.Array, others: jax.Array, items: jax.Array) -> jax.Array:
    """For each value, the one of `others` with the same place in sorted order; empty slots are left out."""
    order, other_order = (jnp.argsort(jnp.where(items != 0, array, jnp.inf)) for array in (values, others))
    return others[other_order][jnp.argsort(order)]


def _alpha_score(ratio: jax.Array, coefficient: float) -> jax.Array:
    if abs(coefficient - 1) < 1e-6:
        return ratio
    # The exponent is capped at 80, as in TRL: float32 would soon overflow.
    return (jnp.exp(jnp.minimum((coefficient - 1) * ratio, 80)) - 1) / (coefficient - 1)


_DIVERGENCES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "reverse_kl": lambda ratio, _: ratio,
    "forward_kl": lambda ratio, _: 1 - jnp.exp(-ratio),
    "js_divergence": lambda ratio, _: jnp.log(2.0) + jax.nn.log_sigmoid(ratio),
    "alpha_divergence": _alpha_score,
}


def _exo_pair(t: _Terms) -> jax.Array:
    better, worse = jax.nn.log_sigmoid(t.margin), jax.nn.log_sigmoid(-t.margin)
    return jnp.exp(better) * (better - jnp.log1p(-t.smoothing)) + jnp.exp(worse) * (worse - jnp.log(t.smoothing))


def _robust(t: _Terms) -> jax.Array:
    better, worse = jax.nn.log_sigmoid(t.margin), jax.nn.log_sigmoid(-t.margin)
    return (t.smoothing * worse - (1 - t.smoothing) * better) / (1 - 2 * t.smoothing)


def _discopop(t: _Terms) -> jax.Array:
    share = jax.nn.sigmoid(t.margin / t.tau)
    return -(1 - share) * jax.nn.log_sigmoid(t.margin) + share * jnp.exp(-t.margin)


def _nca_pair(t: _Terms) -> jax.Array:
    chosen, rejected = t.beta * t.chosen, t.beta * t.rejected
    return -jax.nn.log_sigmoid(chosen) - 0.5 * (jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected))


def _aot(t: _Terms) -> jax.Array:
    ours = t.pairs.chosen - t.pairs.rejected
    reference = t.pairs.reference_chosen - t.pairs.reference_rejected
    return smooth(t.beta * (ours - _matched(ours, reference, t.pairs.items)), t.smoothing)


def _aot_unpaired(t: _Terms) -> jax.Array:
    return smooth(t.beta * (t.chosen - _matched(t.chosen, t.rejected, t.pairs.items)), t.smoothing)


_DPO: dict[str, Callable[[_Terms], jax.Array]] = {
    "sigmoid": lambda t: -jax.nn.log_sigmoid(t.margin),
    "sigmoid_smooth": lambda t: smooth(t.margin, t.smoothing),
    "sigmoid_norm": lambda t: -jax.nn.log_sigmoid(t.beta * t.mean_difference),
    "hinge": lambda t: jax.nn.relu(1 - t.margin),
    "ipo": lambda t: jnp.square(t.mean_difference - 1 / (2 * t.beta)),
    "robust": _robust,
    "exo_pair": _exo_pair,
    "discopop": _discopop,
    "nca_pair": _nca_pair,
    "bco_pair": lambda t: -jax.nn.log_sigmoid(t.beta * t.chosen) - jax.nn.log_sigmoid(-t.beta * t.rejected),
    "sppo_hard": lambda t: jnp.square(t.chosen - 0.5 / t.beta) + jnp.square(t.rejected + 0.5 / t.beta),
    "apo_zero": lambda t: 1 - jax.nn.sigmoid(t.beta * t.chosen) + jax.nn.sigmoid(t.beta * t.rejected),
    "apo_down": lambda t: jax.nn.sigmoid(t.beta * t.chosen) + 1 - jax.nn.sigmoid(t.beta * (t.chosen - t.rejected)),
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
}
_SMOOTHED = {"sigmoid_smooth", "robust", "exo_pair", "aot", "aot_unpaired"}
_DIVERGING = {"sigmoid", "sigmoid_smooth", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"}

DPO_LOSS_TYPES = tuple(_DPO)
