"""mergekit's ways of combining models, tensor by tensor."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jlora.lora.task_arithmetic import RULES, Rule, add_changes

Value = int | float


@dataclasses.dataclass(frozen=True)
class Method:
    """A method's settings, and how it combines tensors.

    Attributes:
        of_models: settings that each model has, with their defaults (None: required).
        of_all: settings that all models share, with their defaults (None: required).
        combine: (each model's tensor, the base's or None, each model's settings, the shared ones, random generator) →
            the combined tensor.
        base: whether it needs base_model.
        faults: (each model's settings, the shared ones) of a tensor → what is wrong with them.
        rescales: whether changes that remain after pruning are scaled up (mergekit's `rescale`).
    """

    of_models: Mapping[str, Value | None]
    of_all: Mapping[str, Value | bool | None]
    combine: Callable[..., np.ndarray]
    base: bool
    faults: Callable[[Sequence[dict], dict], list[str]] = lambda of_models, of_all: []
    rescales: bool = False


def _linear(
    arrays: Sequence[np.ndarray], base: np.ndarray | None, of_models: Sequence[dict], of_all: dict, draws: Any
) -> Float[np.ndarray, "..."]:
    total = sum(array * np.float32(own["weight"]) for array, own in zip(arrays, of_models, strict=True))
    return total / np.float32(sum(own["weight"] for own in of_models)) if of_all["normalize"] else total


def _sums_to_zero(of_models: Sequence[dict], of_all: dict) -> list[str]:
    if not of_all["normalize"] or abs(sum(own["weight"] for own in of_models)) > 1e-8:
        return []
    return ["parameters.weight: found weights whose sum is 0, by which the sum is divided unless normalize is false"]


def _slerp(
    arrays: Sequence[np.ndarray], base: np.ndarray, of_models: Sequence[dict], of_all: dict, draws: Any
) -> Float[np.ndarray, "..."]:
    """Shoemake 1985; almost parallel tensors are interpolated linearly, as mergekit does."""
    (other,), t = arrays, of_all["t"]
    lengths = [max(float(np.linalg.norm(array)), 1e-8) for array in (base, other)]
    cosine = float(np.sum((base / np.float32(lengths[0])) * (other / np.float32(lengths[1]))))
    if abs(cosine) > 0.9995:
        return np.float32(1 - t) * base + np.float32(t) * other
    angle = np.arccos(cosine)
    left, right = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    return np.float32(left) * base + np.float32(right) * other


def _passthrough(
    arrays: Sequence[np.ndarray], base: np.ndarray | None, of_models: Sequence[dict], of_all: dict, draws: Any
) -> Float[np.ndarray, "..."]:
    return arrays[0] * np.float32(of_models[0]["scale"])


def _changes(rule: Rule, *, rows: bool = False) -> Callable[..., np.ndarray]:
    """A `combine` that applies `rule` to changes of the base; `rows`: after DELLA's pruning of the changes."""

    def combine(
        arrays: Sequence[np.ndarray], base: np.ndarray, of_models: Sequence[dict], of_all: dict, draws: Any
    ) -> Float[np.ndarray, "..."]:
        densities = [own["density"] for own in of_models]
        changes = [
            array - base if density else np.zeros_like(base) for array, density in zip(arrays, densities, strict=True)
        ]
        if rows:
            changes = [
                _by_rank(change, density, own["epsilon"], draws)
                for change, density, own in zip(changes, densities, of_models, strict=True)
            ]
        change = add_changes(
            changes,
            [own["weight"] for own in of_models],
            dataclasses.replace(rule, average=bool(of_all["normalize"])),
            density=[1.0 if rows or not density else density for density in densities],
            generator=draws,
        )
        return base + change * np.float32(of_all["lambda"])

    return combine


def _by_rank(change: np.ndarray, density: Value, epsilon: Value, draws: np.random.Generator) -> np.ndarray:
    """DELLA's pruning, row by row.

    The value of rank k of n is kept with probability density - ε + 2 ε k / (n - 1), and divided by that.
    """
    if density in (0, 1):
        return change
    table = change.reshape(-1, change.shape[-1]) if change.ndim > 1 else change[None]
    ranks = np.argsort(np.argsort(np.abs(table), axis=1, kind="stable"), axis=1, kind="stable")
    share = np.float32(density - epsilon) + ranks * np.float32(2 * epsilon / max(1, table.shape[1] - 1))
    return np.where(draws.random(table.shape) < share, table / share, np.float32(0)).reshape(change.shape)


def _outside(of_models: Sequence[dict], of_all: dict) -> list[str]:
    return [
        f"parameters.epsilon: found {own['epsilon']} with density {own['density']}; both density - epsilon and density "
        "+ epsilon have to lie between 0 and 1"
        for own in of_models
        if own["density"] not in (0, 1)
        and not 0 < own["density"] - own["epsilon"] <= own["density"] + own["epsilon"] < 1
    ]


def _model_stock(
    arrays: Sequence[np.ndarray], base: np.ndarray, of_models: Sequence[dict], of_all: dict, draws: Any
) -> Float[np.ndarray, "..."]:
    """Jang et al. 2024; with more than two models, cos θ is the mean of the pairs' cosines, as in mergekit."""
    rows = bool(of_all["filter_wise"]) and base.ndim > 1
    flat = [(array - base).reshape(len(base) if rows else 1, -1) for array in arrays]
    lengths = [np.linalg.norm(change, axis=1) for change in flat]
    cosines = [
        np.clip(np.sum(flat[i] * flat[j], axis=1) / np.maximum(lengths[i] * lengths[j], 1e-6), -1, 1)
        for i in range(len(flat))
        for j in range(i)
    ]
    cosine, count = np.mean(cosines, axis=0)[:, None], len(flat)
    share = count * cosine / (1 + (count - 1) * cosine)
    return base + (share * np.mean(flat, axis=0)).reshape(base.shape).astype(np.float32)


def _of_changes(rule: Rule) -> Method:
    of_all = {"normalize": rule.average, "lambda": 1.0}
    rescales = rule.prune == "random"
    return Method({"weight": None, "density": 1.0}, of_all, _changes(rule), base=True, rescales=rescales)


def _della(rule: Rule) -> Method:
    of_models = {"weight": None, "density": 1.0, "epsilon": 0.15}
    of_all = {"normalize": rule.average, "lambda": 1.0}
    return Method(of_models, of_all, _changes(rule, rows=True), base=True, faults=_outside, rescales=True)


METHODS = {
    "linear": Method({"weight": None}, {"normalize": True}, _linear, base=False, faults=_sums_to_zero),
    "slerp": Method({}, {"t": None}, _slerp, base=True),
    "task_arithmetic": _of_changes(RULES["linear"]),
    "ties": _of_changes(RULES["ties"]),
    "dare_linear": _of_changes(RULES["dare_linear"]),
    "dare_ties": _of_changes(RULES["dare_ties"]),
    "della_linear": _della(Rule()),
    "della": _della(Rule(elect=True, average=True)),
    "model_stock": Method({}, {"filter_wise": False}, _model_stock, base=True),
    "passthrough": Method({"scale": 1.0}, {}, _passthrough, base=False),
}
