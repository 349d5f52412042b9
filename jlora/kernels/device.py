"""The kind of device that a program is traced for."""

from typing import Any

import jax

from jlora import devices


def target() -> str:
    """The kind of device: "cpu", "gpu" or "tpu".

    It is that of the mesh in context (`jax.set_mesh`), whose devices need not be present, else JAX's default.
    """
    if (device := _of_mesh()) is not None:
        platform = device.platform
    elif chosen := jax.config.jax_default_device:
        platform = chosen if isinstance(chosen, str) else chosen.platform
    else:
        platform = jax.default_backend()
    return kind_of(platform)


def capability() -> tuple[int, int] | None:
    """The device's CUDA compute capability, such as (8, 0) for an A100; None if it is unknown or has none."""
    if (device := _of_mesh()) is not None and (known := devices.known(device.device_kind)) and known.cuda:
        return known.cuda.capability
    if target() != "gpu" or jax.default_backend() != "gpu":
        return None
    major, _, minor = str(jax.local_devices()[0].compute_capability).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def _of_mesh() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def kind_of(platform: str) -> str:
    """The kind of one of JAX's platforms: "gpu" for every GPU platform, else its own name."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
