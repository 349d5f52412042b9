"""What is known of the device that a program is traced for."""

import jax
import pytest

from jlora.kernels.device import capability, target


@pytest.mark.parametrize(
    ("kind", "platform", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "cuda", ("gpu", (9, 0))),
        ("NVIDIA GeForce RTX 4090", "cuda", ("gpu", (8, 9))),
        ("NVIDIA of tomorrow", "cuda", ("gpu", None)),
        ("TPU v5 lite", "tpu", ("tpu", None)),
        ("cpu", "cpu", ("cpu", None)),
    ],
)
def test_that_of_the_mesh_in_context(kind, platform, found):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        assert (target(), capability()) == found


def test_without_a_mesh_it_is_the_host():
    assert (target(), capability()) == ("cpu", None)
