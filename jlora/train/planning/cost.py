"""The cost of a traced program: the FLOPs of its products and the bytes that they read and write."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of products alone, over all devices.

    The operations between them are fused with them and cost little in comparison.

    Attributes:
        flops: two per multiplication.
        traffic: bytes of the operands and results.
    """

    flops: float = 0.0
    traffic: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.traffic + other.traffic)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.flops * times, self.traffic * times)


def cost(jaxpr: Any, platform: str = "cpu") -> Cost:
    """The cost of a jaxpr.

    A loop counts as often as it runs, or once if that depends on values. Of branches, the costliest counts, or the
    platform's if they are branches for platforms.
    """
    total = Cost()
    for equation in jaxpr.eqns:
        inner = [cost(one, platform) for one in programs(equation)]
        match equation.primitive.name:
            case "dot_general" | "ragged_dot_general" | "ragged_dot":
                total += _product(equation)
            case "scan":
                total += inner[0] * equation.params["length"]
            case "cond" if branches := equation.params.get("branches_platforms"):
                total += inner[chosen(branches, platform)]
            case "cond":
                total += max(inner, key=lambda one: one.flops)
            case "shard_map":  # its body is one device's part
                mesh, axes = equation.params["mesh"], equation.params["newly_manual_axes"]
                total += inner[0] * math.prod(mesh.shape[axis] for axis in axes)
            case "pallas_call":
                total += _kernel(equation, inner[0].flops)
            case name if name.startswith("dot_product_attention"):  # cuDNN's: queries and keys [B, T, N, H]
                total += _attention(equation, 2 if "fwd" in name else 5)
            case _:
                total += sum(inner, Cost())
    return total


def programs(equation: Any) -> list[Any]:
    """The jaxprs that an equation runs."""
    found = []
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns"):
                found.append(one.jaxpr if hasattr(one, "jaxpr") else one)
            elif hasattr(one, "jaxpr"):
                found.append(one.jaxpr)
    return found


def chosen(branches: Sequence[tuple[str, ...] | None], platform: str) -> int:
    """The index of the platform's branch; a branch of None is for all platforms that are not named."""
    of = next((place for place, names in enumerate(branches) if names and platform in names), None)
    return branches.index(None) if of is None else of


def nbytes(aval: Any) -> int:
    """The bytes of an abstract array; 0 if `aval` is not an array."""
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def _product(equation: Any) -> Cost:
    left, right = (variable.aval for variable in equation.invars[:2])
    result = equation.outvars[0].aval
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        depth = math.prod(left.shape[axis] for axis in contracted)
    else:  # rows in groups: each row is multiplied by its group's matrix
        depth = left.shape[-1]
    return Cost(2.0 * math.prod(result.shape) * depth, float(sum(map(nbytes, (left, right, result)))))


def _kernel(equation: Any, flops: float) -> Cost:
    """A kernel's own estimate or, without one, its products in every block of its grid.

    What it reads and writes is counted once, since its products work on data on the chip.
    """
    own = equation.params.get("cost_estimate")
    ends = sum(nbytes(variable.aval) for variable in (*equation.invars, *equation.outvars))
    if own is not None:
        return Cost(float(own.flops), float(own.bytes_accessed or ends))
    return Cost(flops * math.prod(equation.params["grid_mapping"].grid), float(ends))


def _attention(equation: Any, products: int) -> Cost:
    queries, keys, *_ = (variable.aval for variable in equation.invars)
    batch, length, heads, width = queries.shape
    flops = 2.0 * products * batch * heads * length * keys.shape[1] * width
    return Cost(flops, float(products * (nbytes(queries) + nbytes(keys))))
