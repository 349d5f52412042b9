"""Searches over forecasts: the cheapest change that makes a run fit, and the longest rows that fit."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jlora.errors import UserError
from jlora.sharding import MeshConfig
from jlora.train.config import RunConfig, resolve, to_dict
from jlora.train.planning.forecast import Forecast
from jlora.train.planning.topology import Topology

# (settings) → the forecast of a run with them.
Ask = Callable[[RunConfig], Forecast]

GRAIN = 128  # tokens: kernels' blocks are multiples of this
MOST = 9  # the most forecasts in a search for the longest rows
CLOSE = 0.02  # the search ends once it is within this share of the longest row length that fits


class Change(NamedTuple):
    """Settings that differ from those asked for."""

    config: RunConfig
    flags: tuple[str, ...]


class Found(NamedTuple):
    """A change that fits, and what it needs."""

    flags: tuple[str, ...]
    forecast: Forecast


def cheapest(config: RunConfig, topology: Topology, needed: Forecast, ask: Ask) -> Found | None:
    """The first change that fits; None if not even all of them together fit.

    Each is tried alone, from the one that costs the least time to the costliest, then added to one another in the same
    order.

    Args:
        needed: the forecast of `config`, which does not fit.
    """
    for change in CHANGES:
        for found in _tried(change(config, topology), needed, ask):
            if found.forecast.fits:
                return found
    flags: dict[str, str] = {}
    for change in CHANGES:
        furthest = [*change(config, topology)][-1:]
        if not furthest:
            continue
        [last] = furthest
        config = last.config
        flags |= {flag.partition("=")[0]: flag for flag in last.flags}
        if len(flags) > len(last.flags):  # alone it was tried above
            found = Found(tuple(flags.values()), ask(config))
            if found.forecast.fits:
                return found
    return None


def _tried(changes: Iterator[Change], needed: Forecast, ask: Ask) -> Iterator[Found]:
    """The changes of one kind that may fit, from the smallest to the furthest.

    The furthest is measured first; if it fits, smaller ones are measured unless a line from `needed` through it rules
    them out.
    """
    row = list(changes)
    if not row:
        return
    last = Found(row[-1].flags, ask(row[-1].config))
    if not last.forecast.fits:
        return
    of = [change.config.train.batch_size for change in row]
    top, bottom = needed.peak_bytes_per_device, last.forecast.peak_bytes_per_device
    whole = of[0] * 2
    for place, change in enumerate(row[:-1]):
        share = (of[place] - of[-1]) / (whole - of[-1])
        if bottom + share * (top - bottom) <= needed.memory_bytes:
            yield Found(change.flags, ask(change.config))
    yield last


def _remat(config: RunConfig, topology: Topology) -> Iterator[Change]:
    if config.train.remat in (False, "none"):
        yield from _with(config, train={"remat": True})


def _smaller_batches(config: RunConfig, topology: Topology) -> Iterator[Change]:
    """Halves the micro-batch as long as every device has a row; the batch of a step stays the same."""
    rows = max(1, config.mesh.data) * max(1, config.mesh.fsdp)
    batch, accumulated = config.train.batch_size, config.train.grad_accum
    while batch % 2 == 0 and (batch // 2) % rows == 0:
        batch, accumulated = batch // 2, accumulated * 2
        yield from _with(config, train={"batch_size": batch, "grad_accum": accumulated})


def _quantised(config: RunConfig, topology: Topology) -> Iterator[Change]:
    if config.model.quant is None and config.lora is not None:
        yield from _with(config, model={"quant": "nf4"})


def _more_devices(config: RunConfig, topology: Topology) -> Iterator[Change]:
    """Splits the weights over all devices; every device gets at least one row."""
    count, mesh = topology.count, config.mesh
    if math.prod(max(1, size) for size in vars(mesh).values()) >= count or -1 in vars(mesh).values():
        return
    batch, accumulated = config.train.batch_size, config.train.grad_accum
    settings: dict[str, dict[str, Any]] = {"mesh": vars(MeshConfig(fsdp=count))}
    if batch % count:
        whole = count * -(-batch // count)
        settings["train"] = {"batch_size": whole, "grad_accum": -(-batch * accumulated // whole)}
    yield from _with(config, **settings)


def _offloaded(config: RunConfig, topology: Topology) -> Iterator[Change]:
    yield from _with(config, train={"remat": "offload"})


CHANGES = (_remat, _smaller_batches, _quantised, _more_devices, _offloaded)


def _with(config: RunConfig, **groups: dict[str, Any]) -> Iterator[Change]:
    """The settings with these changes, if they are valid and differ from `config`."""
    try:
        values = to_dict(config)
        found = resolve(values | {group: values[group] | own for group, own in groups.items()})
    except UserError:
        return
    flags = tuple(
        f"--config.{group}.{name}={value}"
        for group, values in groups.items()
        for name, value in values.items()
        if getattr(getattr(config, group), name) != value
    )
    if flags:
        yield Change(found, flags)


def longest(config: RunConfig, topology: Topology, ask: Ask) -> Found | None:
    """The longest `train.seq_len` that fits, to within a fiftieth; None if not even the shortest rows fit.

    A curve through the measured lengths says where to look next, until a length that fits and one that does not are
    close.

    Raises:
        UserError: the memory of the devices is not known.
    """
    grain = GRAIN * max(1, config.mesh.sequence)
    points: dict[int, Forecast] = {}

    def measure(length: int) -> bool:
        points[length] = ask(_of_length(config, length))
        if points[length].fits is None:
            raise UserError(f"--max_seq_len: the memory of {topology.device.full_name} is not known")
        return bool(points[length].fits)

    length = max(grain, config.train.seq_len // grain * grain)
    while length and len(points) < MOST:
        measure(length)
        length = _next({one: found.peak_bytes_per_device for one, found in points.items()}, points[length], grain)
    fitting = max((one for one, found in points.items() if found.fits), default=None)
    return None if fitting is None else Found((f"--config.train.seq_len={fitting}",), points[fitting])


def _next(peaks: dict[int, int], last: Forecast, grain: int) -> int | None:
    """The next length to measure; None if the search is over.

    It is where the curve through the peaks nearest to the memory meets it, kept between the lengths known to fit and
    known not to.
    """
    memory = last.memory_bytes
    fitting = max((one for one, peak in peaks.items() if peak <= memory), default=0)
    over = min((one for one, peak in peaks.items() if peak > memory), default=None)
    close = max(grain, CLOSE * fitting)
    if over is not None and over - fitting <= close:
        return None
    if len(peaks) == 1:
        return 2 * fitting if over is None else max(grain, over // 2 // grain * grain)
    meets = _meets(peaks, memory, fitting, over)
    if len(peaks) > 2 and fitting and 0 <= meets - fitting <= close:
        return None
    low, high = fitting + grain, over - grain if over is not None else 16 * fitting
    return int(min(max(meets, low), high)) // grain * grain


def _meets(peaks: dict[int, int], memory: int, fitting: int, over: int | None) -> float:
    """Where a line through two (or a parabola through three) of the peaks nearest to the memory reaches it.

    Half-way between the bounds if it does not do so between them.
    """
    nearest = sorted(peaks, key=lambda one: abs(peaks[one] - memory))[:3]
    scale = max(nearest)
    beyond = [(peaks[one] - memory) / memory for one in nearest]
    curve = np.polyfit([one / scale for one in nearest], beyond, len(nearest) - 1)
    roots = [float(root.real) * scale for root in np.roots(curve) if abs(root.imag) < 1e-9]
    inside = [root for root in roots if fitting <= root <= (over or math.inf)]
    if inside:
        return min(inside)
    return (fitting + over) / 2 if over is not None else 2.0 * fitting


def _of_length(config: RunConfig, length: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=length))
