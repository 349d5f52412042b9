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
    """What a method reads, and what it makes of tensors.

    Attributes:
        of_models: settings that every model has, with their defaults (None: required).
        of_all: settings of the whole.
        combine: (tensors by model, the base's or None, settings by model, settings of the whole, random numbers).
        base: whether it needs base_model.
        faults: what is wrong with the settings of a tensor: (by model, of the whole).
    """

    of_models: Mapping[str, Value | None]
    of_all: Mapping[str, Value | bool | None]
    combine: Callable[..., np.ndarray]
    base: bool
    faults: Callable[[Sequence[dict], dict], list[str]] = lambda of_models, of_all: []


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
    """Shoemake 1985; almost parallel tensors are interpolated along the line, as mergekit does."""
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


def _changes(rule: Rule) -> Callable[..., np.ndarray]:
    """What `rule` makes of changes of the base."""

    def combine(
        arrays: Sequence[np.ndarray], base: np.ndarray, of_models: Sequence[dict], of_all: dict, draws: Any
    ) -> Float[np.ndarray, "..."]:
        change = add_changes(
            [array - base for array in arrays],
            [own["weight"] for own in of_models],
            dataclasses.replace(rule, average=bool(of_all["normalize"])),
            density=[own["density"] for own in of_models],
            generator=draws,
        )
        return base + change * np.float32(of_all["lambda"])

    return combine


def _of_changes(rule: Rule) -> Method:
    of_all = {"normalize": rule.average, "lambda": 1.0}
    return Method({"weight": None, "density": 1.0}, of_all, _changes(rule), base=True)


METHODS = {
    "linear": Method({"weight": None}, {"normalize": True}, _linear, base=False, faults=_sums_to_zero),
    "slerp": Method({}, {"t": None}, _slerp, base=True),
    "task_arithmetic": _of_changes(RULES["linear"]),
    "ties": _of_changes(RULES["ties"]),
    "dare_linear": _of_changes(RULES["dare_linear"]),
    "dare_ties": _of_changes(RULES["dare_ties"]),
    "passthrough": Method({"scale": 1.0}, {}, _passthrough, base=False),
}
