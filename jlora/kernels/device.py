"""The kind of device that a program is traced for."""

import jax


def target() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in context (`jax.set_mesh`), which may be of devices that are not here,
    else JAX's default.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        platform = device.platform
    elif chosen := jax.config.jax_default_device:
        platform = chosen if isinstance(chosen, str) else chosen.platform
    else:
        platform = jax.default_backend()
    return kind_of(platform)


def kind_of(platform: str) -> str:
    """ "gpu" for every platform of JAX's that is one."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
