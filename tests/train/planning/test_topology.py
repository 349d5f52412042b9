"""Devices by name. The compilers' own answers need jlora[tpu] or jlora[cuda13]."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

from jlora.cli.main import COMPILERS
from jlora.devices import DEVICES
from jlora.errors import UserError
from jlora.train.planning.topology import parse


@pytest.mark.parametrize(
    ("name", "device", "count"),
    [
        ("v5e", "v5e", 1),
        ("v5e:1x1", "v5e", 1),
        ("v5e:2x4", "v5e", 8),
        ("v5p:2x2x1", "v5p", 4),
        ("h100", "h100", 1),
        ("h100x8", "h100", 8),
        ("a100-80x2", "a100-80", 2),
        ("cpu:4", "cpu", 4),
    ],
)
def test_names(name, device, count):
    found = parse(name)
    assert (found.device.name, found.count) == (device, count)


@pytest.mark.parametrize("name", ["", "v5e:0x4", "h100x", "h100x0", "cpu:two", "H100"])
def test_what_is_no_name(name):
    with pytest.raises(UserError, match=f"--topology={name}: "):
        parse(name)


def compiler(name):
    topology = parse(name)
    if not topology.has_compiler:
        pytest.skip(f"needs jlora[{topology.extra}]")
    return topology


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, device in DEVICES.items() if device.platform == "cuda"])
def test_cuda_cards_compile(name):
    topology = compiler(f"{name}x2")
    one = jax.sharding.SingleDeviceSharding(topology.devices()[0])
    shape = jax.ShapeDtypeStruct((256, 256), jax.numpy.bfloat16, sharding=one)
    compiled = jax.jit(lambda x: x @ x).lower(shape).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 256 * 256 * 2
    assert len(topology.devices()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e", "v5e:2x4", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1"])
def test_tpu_shapes_are_described(name):
    topology = compiler(name)
    found = topology.devices()
    assert len(found) == topology.count
    assert found[0].device_kind.startswith(topology.device.kinds)


@pytest.mark.slow
def test_a_shape_that_the_compiler_does_not_have_is_one_message():
    with pytest.raises(UserError, match=r"XLA's compiler does not have it"):
        compiler("v5e:3x5").devices()


@pytest.mark.slow
def test_two_processes_compile_for_a_tpu_at_once():
    compiler("v5e")
    code = "from jlora.train.planning.topology import parse; print(len(parse('v5e').devices()), flush=True); input()"
    settings = dict(env=os.environ | COMPILERS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([sys.executable, "-c", code], **settings) for _ in range(2)]
    try:
        assert [process.stdout.readline().strip() for process in processes] == ["1", "1"]
    finally:
        for process in processes:
            process.communicate("\n")


def test_stand_ins_have_to_be_there():
    topology = dataclasses.replace(parse("cpu"), shape=(4096,))
    with pytest.raises(UserError, match=r"this process has \d+ CPU devices"):
        topology.devices()
