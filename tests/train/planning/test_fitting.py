"""What makes a run fit, by made-up memories."""

import dataclasses
import json
import re

import pytest

from jlora.cli.overrides import read_config
from jlora.train.config import resolve
from jlora.train.planning import fitting, topology
from jlora.train.planning.forecast import Forecast, _said_to_need

GIB = 2**30


def settings(**groups):
    values = {
        "model": {"path": "m"},
        "data": {"path": "d"},
        "train": {"steps": 1, "batch_size": 8, "seq_len": 1024},
    }
    return resolve({name: {**values.get(name, {}), **groups.get(name, {})} for name in {*values, *groups}})


def asked(memory, formula):
    """(settings) → a forecast by a formula in GiB, and the list of settings that were asked about."""
    seen = []

    def ask(config):
        seen.append(config)
        peak = int(formula(config) * GIB)
        numbers = {field.name: 0 for field in dataclasses.fields(Forecast)}
        texts = dict(topology="x", estimated=False, bytes_by_kind={}, received_bytes={}, seconds_per_step=None)
        floats = dict(flops=0.0, traffic_bytes=0.0, trace_seconds=0.0, compile_seconds=0.0)
        return Forecast(**numbers | texts | floats | dict(peak_bytes_per_device=peak, memory_bytes=int(memory * GIB)))

    return ask, seen


def needs(config):
    """Weights over the devices, and activations by rows and tokens."""
    weights = (4 if config.model.quant else 16) / config.mesh.fsdp
    kept = {False: 4, "none": 4, "offload": 0.25}.get(config.train.remat, 1)
    return weights + kept * config.train.batch_size / config.mesh.fsdp * config.train.seq_len / 1024


@pytest.mark.parametrize(
    ("memory", "topo", "groups", "flags"),
    [
        (25, "h100", {"train": {"remat": False}}, "remat=True"),
        (21, "h100", {}, "batch_size=4 --config.train.grad_accum=2"),
        (18, "h100", {}, "batch_size=2 --config.train.grad_accum=4"),
        (13, "h100", {}, "model.quant=nf4"),
        (
            8,
            "h100x4",
            {"model": {"quant": "nf4"}, "train": {"batch_size": 7}},
            "mesh.fsdp=4 --config.train.batch_size=8",
        ),
        (5.5, "h100", {}, "batch_size=1 --config.train.grad_accum=8 --config.model.quant=nf4"),
        (6.5, "h100", {"model": {"quant": "nf4"}, "train": {"batch_size": 7}}, "--config.train.remat=offload"),
    ],
)
def test_the_cheapest_change_that_fits(memory, topo, groups, flags):
    config = settings(**groups)
    ask, _ = asked(memory, needs)
    found = fitting.cheapest(config, topology.parse(topo), ask(config), ask)
    assert flags in " ".join(found.flags), found
    assert found.forecast.fits


def test_nothing_helps_a_model_that_is_too_large():
    ask, _ = asked(1, needs)
    assert fitting.cheapest(settings(), topology.parse("h100"), ask(settings()), ask) is None


def test_the_flags_are_what_the_command_line_takes(tmp_path):
    ask, _ = asked(5.5, needs)
    found = fitting.cheapest(settings(), topology.parse("h100"), ask(settings()), ask)
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model": {"path": "m"}, "data": {"path": "d"}, "train": {"steps": 1, "batch_size": 8}}))
    changed = resolve(read_config(str(file), found.flags))
    assert (changed.train.batch_size, changed.train.grad_accum, changed.model.quant) == (1, 8, "nf4")


@pytest.mark.parametrize(
    "formula",
    [lambda length: 6 + length / 1000, lambda length: 6 + length / 4000 + (length / 8000) ** 2],
    ids=["linear", "quadratic"],
)
@pytest.mark.parametrize("memory", [7.0, 16.0, 79.0])
def test_the_longest_rows_that_fit(formula, memory):
    ask, seen = asked(memory, lambda config: formula(config.train.seq_len))
    found = fitting.longest(settings(), topology.parse("h100"), ask)
    length = int(re.search(r"--config.train.seq_len=(\d+)", found.flags[0])[1])
    assert formula(length) <= memory and length % 128 == 0
    assert formula(length * 1.03 + 128) > memory
    assert len(seen) <= 6 and len({config.train.seq_len for config in seen}) == len(seen)


def test_no_rows_fit_beside_weights_that_do_not():
    ask, seen = asked(5, lambda config: 6 + config.train.seq_len / 1000)
    assert fitting.longest(settings(), topology.parse("h100"), ask) is None and len(seen) < 9


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (59.5G) "
            "exceeds available HBM (15.75G).",
            60.5,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5),
        ("INTERNAL: something else", None),
    ],
)
def test_what_a_compiler_says_that_it_needs(message, needed):
    assert _said_to_need(message, GIB) == (needed and needed * GIB)
