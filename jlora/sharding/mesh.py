"""The device mesh (data, fsdp, tensor, sequence) and the placement of batches on it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.errors import UserError, number_of

AXES = ("data", "fsdp", "tensor", "sequence")
# The axes that split a batch's rows, its tokens, every weight, heads and hidden units, and heads when tokens are whole.
ROWS = ("data", "fsdp")
TOKENS = "sequence"
WEIGHTS = "fsdp"
FEATURES = "tensor"
HEADS = (FEATURES, TOKENS)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, for all devices that are left.

    `data` and `fsdp` split the batch's rows; `fsdp` also splits every weight, `tensor` splits heads and hidden units,
    and `sequence` splits tokens. In attention, tokens are whole and `sequence` splits heads too if tensor × sequence
    divides them; otherwise each device gathers the keys and values of all tokens.

    Attributes:
        data: ways in which rows are split, with a copy of the weights on each.
        fsdp: ways in which rows and every weight are split.
        tensor: ways in which heads and hidden units are split.
        sequence: ways in which the tokens of a row are split.

    Raises:
        ValueError: a size is 0 or below -1, or several are -1.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh sizes must be positive, at most one of them -1 (the rest); found {self}")

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over `devices` (default: all). Axes of size 1 cost nothing; a mesh of size 1 takes the first device.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(config.sizes)
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if len(devices) % known:
            raise UserError(
                f"{config}: the fixed sizes multiply to {known}, which does not divide "
                f"{number_of(len(devices), 'device')}"
            )
        sizes[sizes.index(-1)] = len(devices) // known
    total = math.prod(sizes)
    if total == 1:
        devices = devices[:1]
    if total != len(devices):
        raise UserError(f"{config}: sizes multiply to {total}, but the number of devices is {len(devices)}")
    return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of a batch [..., B, T], whose first `leading` axes are not split."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, ROWS, TOKENS))


def row_ways(mesh: Mesh) -> int:
    """How many parts the mesh splits the rows of a batch into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def token_ways(mesh: Mesh) -> int:
    """How many parts the mesh splits the tokens of a row into."""
    return mesh.shape[TOKENS]


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The host's arrays (the same on every host) on the mesh.

    A device holds only its rows and tokens of [A, B, T] and [A, K, B, T], but all of [A, N].

    Raises:
        ValueError: the mesh does not divide B or T.
    """
    rows, tokens = row_ways(mesh), token_ways(mesh)
    for name, value in batch.items():
        if value.ndim >= 3 and (value.shape[-2] % rows or value.shape[-1] % tokens):
            raise UserError(
                f"batch {name!r} has {number_of(value.shape[-2], 'row')} of "
                f"{number_of(value.shape[-1], 'token')}; the mesh splits rows {rows} ways "
                f"(data × fsdp), tokens {tokens} ways (sequence): change train.batch_size or mesh"
            )
    return {
        name: jax.make_array_from_callback(
            value.shape,
            batch_sharding(mesh, leading=value.ndim - 2) if value.ndim >= 3 else replicated(mesh),
            lambda index, value=value: value[index],
        )
        for name, value in batch.items()
    }


def on_host(values: Any) -> Any:
    """A tree's arrays as whole NumPy arrays, whichever devices and hosts they are on. Every host must call it."""
    if jax.process_count() == 1:
        return jax.device_get(values)

    def whole(leaf: Any) -> Any:
        apart = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
        return multihost_utils.process_allgather(leaf, tiled=True) if apart else np.asarray(leaf)

    return jax.tree.map(whole, values)


def from_all_hosts(content: bytes) -> list[bytes]:
    """The contents of all processes, in order. A collective: call it on all."""
    if jax.process_count() == 1:
        return [content]
    sizes = multihost_utils.process_allgather(np.array(len(content), np.int32)).tolist()
    room = np.zeros(1 << max(sizes).bit_length(), np.uint8)  # few different sizes: each is compiled
    room[: len(content)] = np.frombuffer(content, np.uint8)
    found = multihost_utils.process_allgather(room)
    return [one[:size].tobytes() for one, size in zip(found, sizes, strict=True)]


def on_any_host(flag: bool) -> bool:
    """Whether `flag` is true on at least one host. Every host must call it."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


class Vote:
    """`on_any_host` for repeated calls while the devices are busy.

    With several hosts, each call returns the previous call's answer, since the devices would compute this one's only
    after the work they have queued.
    """

    def __init__(self) -> None:
        self._before: jax.Array | None = None

    def __call__(self, flag: bool) -> bool:
        """Whether a flag was true on some host: this one with a single host, else the previous call's.

        A collective: call it on all hosts.
        """
        if jax.process_count() == 1:
            return flag
        before, self._before = self._before, _any(flag)
        return before is not None and bool(np.asarray(before))


def _any(flag: bool) -> jax.Array:
    """Whether `flag` is true on at least one host, as an array on every device, computed asynchronously."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("host", "device"))
    placed = NamedSharding(mesh, PartitionSpec("host"))
    flags = jax.make_array_from_callback((jax.process_count(),), placed, lambda index: np.array([flag]))
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))(flags)
