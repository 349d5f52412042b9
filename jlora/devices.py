"""A table of accelerators: their peak rates, their memory, and how to have XLA compile for one that is not present.

Figures are the makers', for one chip and for dense bfloat16 products with float32 sums:
- TPU: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e; host links: "How to Scale Your Model", 2025.
- NVIDIA: the data sheets of A100, H100, H200 and L40S; "Ada GPU Architecture" (GeForce RTX 4090). Cores, caches
  and memory sizes as in XLA's own target descriptions (xla/backends/gpu/target_config/specs) where those have the card.
"""

import dataclasses
import re
from typing import NamedTuple

GIB = 2**30


class Cuda(NamedTuple):
    """What XLA's GPU compiler needs to know about a card.

    Attributes:
        capability: compute capability, major and minor.
        cores: multiprocessors.
        lanes: float32 units per multiprocessor.
        shared: bytes of shared memory per multiprocessor, and the most that one block can use.
        threads: the most threads that a multiprocessor holds.
        cache: bytes of the second-level cache.
        clock: GHz.
    """

    capability: tuple[int, int]
    cores: int
    lanes: int
    shared: tuple[int, int]
    threads: int
    cache: int
    clock: float


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip.

    Attributes:
        name: as `jlora plan --topology` takes it.
        kinds: prefixes of its `jax.Device.device_kind`.
        flops: bfloat16 FLOP per second; None if unknown.
        bandwidth: bytes per second of its own memory.
        memory: bytes of it that a program can use; None for a CPU, which has the host's.
        host_link: bytes per second from the host's memory, one way.
        links: bytes per second from the other chips, one way, over all links.
        cuda: what XLA's GPU compiler needs, for NVIDIA's cards.
    """

    name: str
    platform: str
    kinds: tuple[str, ...] = ()
    flops: float | None = None
    bandwidth: float | None = None
    memory: int | None = None
    host_link: float | None = None
    links: float | None = None
    full_name: str = ""
    cuda: Cuda | None = None

    @property
    def usable(self) -> int | None:
        """Bytes of its memory left for a program: CUDA, its libraries and fragmentation take about 1 GiB."""
        return self.memory - GIB if self.memory and self.platform == "cuda" else self.memory


def _tpu(name: str, kinds: tuple[str, ...], *figures: float) -> Device:
    flops, bandwidth, memory, host_link, links = figures
    return Device(name, "tpu", kinds, flops, bandwidth, int(memory * GIB), host_link, links, f"TPU {name}")


def _gpu(name: str, full_name: str, kind: str, figures: tuple[float, ...], cuda: Cuda) -> Device:
    flops, bandwidth, memory, host_link, links = figures
    return Device(name, "cuda", (kind,), flops, bandwidth, int(memory), host_link, links, full_name, cuda)


_AMPERE = dict(capability=(8, 0), cores=108, lanes=64, shared=(167936, 166912), threads=2048, cache=40 << 20)
_HOPPER = dict(capability=(9, 0), cores=132, lanes=128, shared=(233472, 232448), threads=2048, cache=50 << 20)
_ADA = dict(capability=(8, 9), lanes=128, shared=(102400, 101376), threads=1536, clock=2.52)

DEVICES = {
    device.name: device
    for device in (
        # Memory: what libtpu leaves to programs of the nominal 32, 16, 95 and 32 GB.
        _tpu("v4", ("TPU v4",), 275e12, 1.228e12, 31.25, 16e9, 270e9),
        _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 0.819e12, 15.75, 16e9, 180e9),
        _tpu("v5p", ("TPU v5p", "TPU v5"), 459e12, 2.765e12, 95.74, 16e9, 540e9),
        _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1.64e12, 31.25, 32e9, 360e9),
        _gpu("a100-40", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB",
             (312e12, 1.5552e12, 42331013120.0, 32e9, 300e9), Cuda(**_AMPERE, clock=1.41)),
        _gpu("a100-80", "NVIDIA A100-SXM4-80GB", "NVIDIA A100",
             (312e12, 2.03904e12, 85100068864.0, 32e9, 300e9), Cuda(**_AMPERE, clock=1.41)),
        _gpu("h100", "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3",
             (989.4e12, 3.35232e12, 84942979072.0, 64e9, 450e9), Cuda(**_HOPPER, clock=1.98)),
        _gpu("h200", "NVIDIA H200", "NVIDIA H200",
             (989.4e12, 4.8e12, 151397597184.0, 64e9, 450e9), Cuda(**_HOPPER, clock=1.98)),
        _gpu("l40s", "NVIDIA L40S", "NVIDIA L40S",
             (362.05e12, 0.864e12, 47.7e9, 32e9, 32e9), Cuda(**_ADA, cores=142, cache=96 << 20)),
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090",
             (165.2e12, 1.008e12, 25.2e9, 32e9, 32e9), Cuda(**_ADA, cores=128, cache=72 << 20)),
        Device("cpu", "cpu", ("cpu",), full_name="this machine's CPU"),
    )
}  # fmt: skip


def known(device_kind: str) -> Device | None:
    """The table's entry for a device by JAX's name for its kind; None if the table does not have it."""
    found = [(len(kind), one) for one in DEVICES.values() for kind in one.kinds if device_kind.startswith(kind)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def target_config(device: Device) -> str:
    """The text that `jax.experimental.topologies` takes for a CUDA card that is not present."""
    cuda = device.cuda
    assert cuda is not None
    major, minor = cuda.capability
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"  # as in "sm_90a"
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": cuda.shared[0],
        "threads_per_core_limit": cuda.threads,
        "core_count": cuda.cores,
        "fpus_per_core": cuda.lanes,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(device.bandwidth),
        "l2_cache_size": cuda.cache,
        "clock_rate_ghz": cuda.clock,
        "device_memory_size": device.memory,
        "shared_memory_per_block_optin": cuda.shared[1],
        "cuda_compute_capability": f"{{ major: {major} minor: {minor} feature_extension: {feature} }}",
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "name": f'"{device.full_name}"',
        "driver_version": '"13.0.0"',
        "runtime_version": '"13.0.0"',
        "compile_time_toolkit_version": '"13.0.0"',
        "dnn_version": '"9.10.0"',
    }
    info = "\n".join(f"  {name}{'' if str(value).startswith('{') else ':'} {value}" for name, value in fields.items())
    return (
        f'gpu_device_info {{\n{info}\n}}\nplatform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"
        f'device_description_str: "{device.full_name}"\n'
    )


def sizes(shape: str) -> tuple[int, ...] | None:
    """(2, 4) for "2x4"; None for text that is not a shape."""
    return tuple(map(int, shape.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else None
