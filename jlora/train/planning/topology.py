"""Devices that are not attached, by name: those of a topology that XLA can compile for, or CPU stand-ins."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from jlora.devices import DEVICES, Device, sizes, target_config
from jlora.errors import UserError

# Platform → packages that can each compile for it, and the extra that installs one.
COMPILERS = {
    "cpu": (("jaxlib",), ""),
    "tpu": (("libtpu",), "tpu"),
    "cuda": (("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "cuda13"),
}
SHAPES = {"v4": "2x2x1", "v5p": "2x2x1"}  # the smallest shape that libtpu has; 2x2 for the others


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to plan for.

    Attributes:
        name: as it was given.
        shape: number of devices along each axis.
    """

    name: str
    device: Device
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> str:
        """The default dtype of computation."""
        return "float32" if self.device.platform == "cpu" else "bfloat16"

    @property
    def memory(self) -> int | None:
        """Bytes of each device's memory that a program can use; None if not known. CPU devices share the machine's."""
        if self.device.platform != "cpu":
            return self.device.usable
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.count

    @property
    def extra(self) -> str:
        """The extra of jlora that installs the compiler."""
        return COMPILERS[self.device.platform][1]

    @property
    def has_compiler(self) -> bool:
        """Whether XLA can compile for these devices here."""
        return any(map(_installed, COMPILERS[self.device.platform][0]))

    def devices(self) -> list[Any]:
        """The devices, for a mesh; this process's CPU devices if there is no compiler for them.

        Raises:
            UserError: the compiler does not know the shape, or the process has too few CPU devices.
        """
        if self.device.platform == "cpu" or not self.has_compiler:
            here = jax.devices("cpu")
            if len(here) < self.count:
                raise UserError(
                    f"--topology={self.name}: this process has {len(here)} CPU devices; set "
                    f"XLA_FLAGS=--xla_force_host_platform_device_count={self.count}"
                )
            return here[: self.count]
        try:
            return list(self._described().devices)[: self.count]
        except (ValueError, RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--topology={self.name}: XLA's compiler does not have it ({reason})") from error

    def _described(self) -> Any:
        if self.device.platform == "cuda":
            shape = f"1x1x{self.count}"  # slices, hosts, devices of a host
            text = target_config(self.device)
            return topologies.get_topology_desc(platform="cuda", topology=shape, target_config=text)
        shape = "x".join(map(str, self.shape))
        if self.count == 1:
            shape = SHAPES.get(self.device.name, "2x2")
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{self.device.name}:{shape}")


def parse(name: str) -> Topology:
    """The topology named "v5e:2x4", "h100", "h100x8", "cpu" or "cpu:4", for example.

    Raises:
        UserError: the device is unknown, or cannot have this shape.
    """
    kind, colon, shape = name.partition(":")
    if not colon and (several := re.fullmatch(r"(.+)x(\d+)", kind)) and several[1] in DEVICES:
        kind, shape = several[1], several[2]
    device = DEVICES.get(kind)
    if device is None:
        raise UserError(
            f"--topology={name}: found {kind!r}, expected one of {', '.join(DEVICES)}, followed by a shape for "
            "several (v5e:2x4, v5p:2x2x1, h100x8)"
        )
    found = sizes(shape or "1")
    cubes = kind in SHAPES
    if found is None or (device.platform != "tpu" and len(found) > 1):
        example = "h100x8" if device.platform == "cuda" else "cpu:8"
        raise UserError(f"--topology={name}: found the shape {shape!r}, expected a number of devices, as in {example}")
    if device.platform == "tpu" and math.prod(found) > 1 and len(found) != (3 if cubes else 2):
        expected = "three sizes, as in 2x2x1" if cubes else "two sizes, as in 2x4"
        raise UserError(f"--topology={name}: found the shape {shape!r}, expected {expected}")
    return Topology(name, device, found)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
