"""What a compiled program moves between devices, read from its text."""

import collections
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16}
BITS |= {"f32": 32, "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')
# The TPU compiler states no trip count, so it is read from the loop's condition: the counter, from 0, is below a
# constant.
_CONSTANT = re.compile(r"%([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(%[\w.-]+, %([\w.-]+)\), direction=LT")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")


class _Computation(NamedTuple):
    """What one computation of a program does.

    Attributes:
        received: (kind, channel) → bytes. The TPU compiler spreads an asynchronous collective over the products that
            hide it, as several fusions that each contain all of it and share one channel.
        fused: the fusions that it calls; of their collectives, each channel counts once.
        calls: what else it calls, and how often.
    """

    received: dict[tuple[str, str], float]
    fused: list[str]
    calls: list[tuple[str, int]]


def received(text: str) -> dict[str, int]:
    """The bytes that a device receives in one run by ring algorithms, by kind of collective.

    Loops count once if the program does not state their trip count.

    Args:
        text: `compiled.as_text()`.
    """
    computations, entry = _read(text)
    nothing = _Computation({}, [], [])

    def channels(name: str) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        for fused in computations.get(name, nothing).fused:
            found |= channels(fused)
        return found | computations.get(name, nothing).received

    @functools.cache
    def total(name: str) -> Mapping[str, float]:
        own: collections.Counter[str] = collections.Counter()
        for (kind, _), size in channels(name).items():
            own[kind] += size
        for called, times in computations.get(name, nothing).calls:
            for kind, count in total(called).items():
                own[kind] += times * count
        return own

    return {kind: int(count) for kind, count in sorted(total(entry).items(), key=lambda pair: -pair[1]) if count}


def _read(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, name, current = "", "", None
    constants: dict[str, int] = {}
    limits: dict[str, int] = {}  # of conditions, which come before their loops
    for number, line in enumerate(text.splitlines()):
        if found := _COMPUTATION.match(line):
            name = found[2]
            current = computations.setdefault(name, _Computation({}, [], []))
            entry = name if found[1] else entry
        elif current is not None:
            if found := _COLLECTIVE.search(line):
                kind, size = found[2], _received(line, *found.groups())
                if name.startswith("all-reduce-scatter"):  # a TPU's fusion of both, which moves half
                    kind, size = "reduce-scatter", size / 2
                channel = _CHANNEL.search(line)
                current.received[kind, channel[1] if channel else f"line {number}"] = size
            if found := _CONSTANT.search(line):
                constants[found[1]] = int(found[2])
            if (found := _BELOW.search(line)) and found[1] in constants:
                limits[name] = constants[found[1]]
            times = _turns(line, limits) if " while(" in line else 1
            if " fusion(" in line:
                current.fused.extend(_called(line))
            else:
                current.calls.extend((called, times) for called in _called(line))
    return computations, entry


def _turns(line: str, limits: Mapping[str, int]) -> int:
    """How often a loop's body runs; 1 if the program does not say."""
    if found := _TRIPS.search(line):
        return int(found[1])
    condition = _CONDITION.search(line)
    return limits.get(condition[1], 1) if condition else 1


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    if branches := _BRANCHES.search(line):
        yield from (name.strip().lstrip("%") for name in branches[1].split(","))


def _received(line: str, result: str, kind: str, start: str | None) -> float:
    shapes = [
        BITS.get(dtype, 32) / 8 * math.prod(int(size) for size in dims.split(",") if size)
        for dtype, dims in _SHAPE.findall(result)
    ]
    # The start of an asynchronous collective returns its operands along with its results.
    size = sum(shapes[len(shapes) // 2 :] if start and kind != "all-reduce" else shapes)
    ways = _ways(line)
    share = (ways - 1) / ways if ways else 1.0
    match kind:
        case "all-reduce":
            return 2 * share * size
        case "reduce-scatter":
            return size * max(ways - 1, 0)
        case "collective-permute":
            return size
        case _:
            return share * size


def _ways(line: str) -> int:
    """How many devices are in each of the collective's groups; 0 if the text does not say."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        # An axis or a part of one: 'a' or 'a':(size before it)its size.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return 0
