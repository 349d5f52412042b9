"""The peak memory of a traced program, from a walk over its equations."""

import itertools
import re
from typing import Any, NamedTuple

import jax

from jlora.train.planning.cost import chosen, nbytes, programs

# Operations that XLA fuses into their users.
FUSED = re.compile(
    r"abs|add|and|bitcast_convert_type|broadcast_in_dim|clamp|concatenate|convert_element_type|copy|copy_p|cos|"
    r"div|eq|erf|exp|expand_dims|floor|gather|ge|gt|integer_pow|iota|is_finite|le|log|log1p|logistic|lt|max|"
    r"min|mul|ne|neg|not|or|pad|pow|reshape|rev|rem|round|rsqrt|select_n|shift_left|shift_right_logical|sign|"
    r"sin|slice|sqrt|square|squeeze|stop_gradient|sub|tanh|transpose|xor"
)


# Calls that run as if their equations were inlined.
CALLS = re.compile(r"jit|pjit|closed_call|custom_(jvp|vjp)_call(_jaxpr)?|remat2?|checkpoint")


class Operation(NamedTuple):
    """An equation that is not a call. Values are numbered; the program's arguments and constants are left out.

    Attributes:
        writes: (value, its bytes).
        inner: the programs that it runs.
    """

    name: str
    reads: frozenset[int]
    writes: tuple[tuple[int, int], ...]
    inner: tuple[Any, ...]

    @property
    def fused(self) -> bool:
        return FUSED.fullmatch(self.name) is not None


def live_bytes(jaxpr: Any, platform: str, host: bool = False) -> int:
    """The peak memory in bytes, not counting the arguments.

    Elementwise equations are assumed to be fused into their users; any other result lives from where it is computed to
    its last use.

    Args:
        host: count the host's memory, where offloaded values are, instead of the device's.
    """
    operations, results = _flat(jaxpr, platform, host)
    made_of: dict[int, frozenset[int]] = {}  # a fused value → the arrays that it is computed from
    last: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for place, operation in enumerate([*operations, Operation("return", results, (), ())]):
        arrays = frozenset().union(*(made_of.get(value, {value}) for value in operation.reads))
        if operation.fused:
            made_of |= {value: arrays for value, _ in operation.writes}
        last |= dict.fromkeys(arrays, place)
        sizes |= dict(operation.writes)
    held = peak = 0
    ending: dict[int, int] = {}
    for place, operation in enumerate(operations):
        inside = max((live_bytes(one, platform, host) for one in operation.inner), default=0)
        if operation.name in ("dot_general", "pallas_call"):  # fused operands have to be written out for these
            inside += sum(sizes[value] for value in operation.reads & made_of.keys())
        for value, size in () if operation.fused else operation.writes:
            held += size
            end = last.get(value, place)
            ending[end] = ending.get(end, 0) + size
        peak = max(peak, held + inside)
        held -= ending.pop(place, 0)
    return peak


def _flat(jaxpr: Any, platform: str, host: bool) -> tuple[list[Operation], frozenset[int]]:
    """The operations of a program, with its calls inlined, and the values that it returns.

    Values in the other memory (device or host) have no bytes.
    """
    operations: list[Operation] = []
    count = itertools.count()

    def walk(jaxpr: Any, names: dict[Any, int | None]) -> list[int | None]:
        def name(variable: Any) -> int | None:
            return None if isinstance(variable, jax.extend.core.Literal) else names.get(variable)

        for equation in jaxpr.eqns:
            reads = [name(variable) for variable in equation.invars]
            kind, inner = equation.primitive.name, programs(equation)
            if branches := equation.params.get("branches_platforms"):
                inner, reads = [inner[chosen(branches, platform)]], reads[1:]
            if inner and (branches or CALLS.fullmatch(kind)):
                [called] = inner[:1]
                given = dict(zip(called.invars, reads, strict=True))
                names |= dict(zip(equation.outvars, walk(called, given), strict=True))
                continue
            writes = {variable: next(count) for variable in equation.outvars}
            names |= writes
            operations.append(
                Operation(
                    kind,
                    frozenset(value for value in reads if value is not None),
                    tuple((value, _nbytes(variable.aval, host)) for variable, value in writes.items()),
                    () if kind == "pallas_call" else tuple(inner),  # a kernel computes on the chip
                )
            )
        return [name(variable) for variable in jaxpr.outvars]

    returned = walk(jaxpr, {})
    return operations, frozenset(value for value in returned if value is not None)


def _nbytes(aval: Any, host: bool) -> int:
    return nbytes(aval) if (getattr(aval, "memory_space", None) == jax.memory.Space.Host) == host else 0
