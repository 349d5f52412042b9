"""`jlora plan`: what a run needs of devices that need not be present, and what to change if it does not fit."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console

from jlora.cli.overrides import read_run
from jlora.errors import UserError, raise_all, size_of
from jlora.train.config import RunConfig
from jlora.train.planning.fitting import Found, cheapest, longest
from jlora.train.planning.forecast import Forecast, forecast
from jlora.train.planning.placement import place
from jlora.train.planning.topology import Topology, parse


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0, whether the run fits or not."""
    topology, config = _asked_for(options.topology, lambda: read_run(options.config, options.overrides, options.sweep))
    _prepare(topology)
    placed = place(config, topology.devices())
    config = dataclasses.replace(config, mesh=placed.sizes)
    ask = _Asking(topology)
    if options.max_seq_len:
        suggestion = longest(config, topology, ask)
        if suggestion is None:
            raise UserError(f"--max_seq_len: not even the shortest rows fit on {topology.name}")
        found = suggestion.forecast
    else:
        found = ask(config)
        suggestion = cheapest(config, topology, found, ask) if found.fits is False else None
    if options.json:
        print(json.dumps(found.to_json() | _suggested(suggestion), indent=2))
    else:
        print("\n".join([*_lines(config, topology, found), *placed.notes, *_advice(config, found, suggestion)]))
    return 0


def _asked_for(name: str, configured: Callable[[], RunConfig]) -> tuple[Topology, RunConfig]:
    """The devices and the settings; faults of both are raised together."""
    found, faults = [], []
    for read in (lambda: parse(name), configured):
        try:
            found.append(read())
        except UserError as error:
            faults.append(str(error))
    raise_all(faults)
    topology, config = found
    return topology, config


def _suggested(suggestion: Found | None) -> dict[str, Any]:
    if suggestion is None:
        return {"suggestion": None}
    return {"suggestion": {"flags": suggestion.flags, "needs": suggestion.forecast.to_json()}}


def _advice(config: RunConfig, found: Forecast, suggestion: Found | None) -> Iterator[str]:
    if suggestion is not None:
        needs = size_of(suggestion.forecast.peak_bytes_per_device)
        what = "longest rows that fit" if suggestion.forecast is found else "cheapest change that fits"
        yield f"{what}: {' '.join(suggestion.flags)}  ({needs} a device)"
    elif not found.fits:
        less = "a lower lora.r" if config.lora else "an adapter (lora.r=…), full.weights='stochastic'"
        yield (
            "No change of remat, batch, quantisation, mesh and offloading makes it fit: try shorter rows "
            f"(--max_seq_len says how long they may be), {less}, a smaller model or more devices"
        )


class _Asking:
    """Makes forecasts, and shows on the terminal what is in progress and what has been found."""

    def __init__(self, topology: Topology) -> None:
        self._topology, self._console = topology, Console(stderr=True, highlight=False)
        self._count = 0

    def __call__(self, config: RunConfig) -> Forecast:
        train = config.train
        doing = "compiling" if self._topology.has_compiler else "tracing"
        what = f"{train.batch_size} × {train.seq_len:,} tokens for {self._topology.name}"
        self._count += 1
        with self._console.status(f"{doing} {what} (no. {self._count})"):
            found = forecast(config, self._topology)
        if self._count > 1 or not found.fits:
            self._console.print(
                f"{what}: {size_of(found.peak_bytes_per_device)}{'' if found.fits else ', does not fit'}"
            )
        return found


def _prepare(topology: Topology) -> None:
    """Keeps this machine's accelerators free, and has JAX see as many CPU devices as the topology has devices."""
    with contextlib.suppress(RuntimeError):  # JAX is initialised already, as in tests
        jax.config.update("jax_platforms", "cpu")
        if topology.count > 1:
            jax.config.update("jax_num_cpu_devices", topology.count)


def _lines(config: RunConfig, topology: Topology, found: Forecast) -> Iterator[str]:
    device = topology.device
    how = "estimated" if found.estimated else f"compiled in {found.compile_seconds:.0f} s"
    yield f"{config.algorithm} of {config.model.path} on {found.devices} × {device.name} ({device.full_name}), {how}"
    if found.estimated:
        yield (
            f"  The memory is an estimate: pip install 'jlora[{topology.extra}]' brings XLA's compiler for these "
            "devices, which gives the exact figure."
        )
    yield f"parameters  {found.trainable_parameters:,} trained, {found.frozen_parameters:,} frozen"
    verdict = {None: "", True: ": fits", False: ": DOES NOT FIT"}[found.fits]
    have = f" of {size_of(found.memory_bytes)}" if found.memory_bytes else ""
    yield f"memory      {size_of(found.peak_bytes_per_device)} a device{have}{verdict}"
    kinds = dict(found.bytes_by_kind) | {"the step's": max(0, found.peak_bytes_per_device - found.argument_bytes)}
    kinds = {name: size for name, size in kinds.items() if size > 2**15}  # less is of no interest
    width = max(map(len, kinds), default=0)
    for name, size in kinds.items():
        yield f"            {name:<{width}}  {size_of(size):>10}"
    if found.host_bytes:
        yield f"            {size_of(found.host_bytes)} of the host's memory, for what is offloaded"
    if found.cache_bytes_per_device:
        yield (
            "            a rollout's keys and values, computed from their shapes: "
            f"{size_of(found.cache_bytes_per_device)} (not there during the step)"
        )
    yield f"step        {found.tokens:,} tokens, {found.flops / 1e12:,.1f} TFLOP"
    if found.seconds_per_step:
        speed = found.tokens / found.seconds_per_step
        yield (
            f"            at the device's peaks at least {found.seconds_per_step:.3g} s, at most {speed:,.0f} tokens/s"
        )
    if (
        device.memory
        and device.platform == "cuda"
        and found.peak_bytes_per_device > 0.75 * device.memory
        and found.fits
    ):
        yield "            JAX takes 75% of a GPU's memory unless told otherwise: XLA_PYTHON_CLIENT_MEM_FRACTION=.97"
    if found.devices > 1:
        nothing = "not known without the compiler" if found.estimated else "nothing"
        moved = ", ".join(f"{kind} {size_of(size)}" for kind, size in found.received_bytes.items())
        yield f"moves       each device receives in a step: {moved or nothing}"
