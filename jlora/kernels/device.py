"""The kind of device that a program is traced for."""

from typing import Any

import jax

from jlora import devices


def target() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in context (`jax.set_mesh`), which may be of devices that are not here,
    else JAX's default.
    """
    if (device := _of_mesh()) is not None:
        platform = device.platform
    elif chosen := jax.config.jax_default_device:
        platform = chosen if isinstance(chosen, str) else chosen.platform
    else:
        platform = jax.default_backend()
    return kind_of(platform)


def capability() -> tuple[int, int] | None:
    """CUDA's of that device: (8, 0) of an A100; None of what is unknown or has none."""
    if (device := _of_mesh()) is not None and (known := devices.known(device.device_kind)) and known.cuda:
        return known.cuda.capability
    if target() != "gpu" or jax.default_backend() != "gpu":
        return None
    major, _, minor = str(jax.local_devices()[0].compute_capability).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def _of_mesh() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def kind_of(platform: str) -> str:
    """ "gpu" for every platform of JAX's that is one."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
