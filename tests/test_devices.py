"""The table of devices."""

import pytest

from jlora import devices


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("cpu", "cpu"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce GTX 970", None),
    ],
)
def test_a_device_is_found_by_what_jax_calls_it(kind, name):
    found = devices.known(kind)
    assert (found and found.name) == name


def test_peaks_are_consistent_with_cores_and_clocks():
    """Tensor cores do a fixed number of operations a clock and multiprocessor: the table holds no figure for sparse
    products, of half precision sums or of another card.
    """
    per_core = {"a100-40": 2048, "a100-80": 2048, "h100": 4096, "h200": 4096, "l40s": 1024, "rtx4090": 512}
    for name, operations in per_core.items():
        device = devices.DEVICES[name]
        clock = device.flops / (operations * device.cuda.cores)
        assert clock == pytest.approx(device.cuda.clock * 1e9, rel=0.08), name


def test_a_target_config_says_what_the_card_is():
    text = devices.target_config(devices.DEVICES["rtx4090"])
    assert "core_count: 128" in text and "{ major: 8 minor: 9 feature_extension: NONE }" in text
    assert 'device_description_str: "NVIDIA GeForce RTX 4090"' in text


@pytest.mark.parametrize(("text", "found"), [("2x4", (2, 4)), ("1", (1,)), ("2x0", None), ("2*4", None), ("", None)])
def test_shapes(text, found):
    assert devices.sizes(text) == found
