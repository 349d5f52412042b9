"""What a traced program costs: the FLOPs of its products and the bytes that they read and write."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of products alone, over all devices; what lies between them is fused with them and costs little beside them.

    Attributes:
        flops: two for each multiplication.
        traffic: bytes of their operands and results.
    """

    flops: float = 0.0
    traffic: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.traffic + other.traffic)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.flops * times, self.traffic * times)


def cost(jaxpr: Any) -> Cost:
    """The cost of a jaxpr: loops count as often as they run (one whose end depends on values, once), and of branches
    the dearest.
    """
    total = Cost()
    for equation in jaxpr.eqns:
        inner = [cost(one) for one in _inner(equation)]
        match equation.primitive.name:
            case "dot_general" | "ragged_dot_general" | "ragged_dot":
                total += _product(equation)
            case "scan":
                total += inner[0] * equation.params["length"]
            case "cond":
                total += max(inner, key=lambda one: one.flops)
            case "pallas_call":
                total += inner[0] * math.prod(equation.params["grid_mapping"].grid)
            case name if name.startswith("dot_product_attention"):  # cuDNN's: queries and keys [B, T, N, H]
                total += _attention(equation, 2 if "fwd" in name else 5)
            case _:
                total += sum(inner, Cost())
    return total


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "jaxpr"):
                yield one.jaxpr
            elif hasattr(one, "eqns"):
                yield one


def _product(equation: Any) -> Cost:
    left, right = (variable.aval for variable in equation.invars[:2])
    result = equation.outvars[0].aval
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        depth = math.prod(left.shape[axis] for axis in contracted)
    else:  # rows in groups: each row meets one group's matrix
        depth = left.shape[-1]
    return Cost(2.0 * math.prod(result.shape) * depth, float(sum(map(_bytes, (left, right, result)))))


def _attention(equation: Any, products: int) -> Cost:
    queries, keys, *_ = (variable.aval for variable in equation.invars)
    batch, length, heads, width = queries.shape
    flops = 2.0 * products * batch * heads * length * keys.shape[1] * width
    return Cost(flops, float(products * (_bytes(queries) + _bytes(keys))))


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
