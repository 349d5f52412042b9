"""What a run needs, before any weight is read: its actual training step, compiled from shapes alone."""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora import hub, sharding, tree
from jlora.quant import is_packed
from jlora.train import many
from jlora.train.adapt import adapt, based
from jlora.train.algorithms import ALGORITHMS
from jlora.train.algorithms.algorithm import Base, Plan
from jlora.train.config import RunConfig
from jlora.train.learning import learn
from jlora.train.planning.cost import Cost, cost
from jlora.train.planning.live import live_bytes
from jlora.train.planning.moved import received
from jlora.train.planning.placement import place
from jlora.train.planning.topology import Topology


class Program(NamedTuple):
    """A training step that was traced from shapes, but not compiled yet.

    Attributes:
        arguments: (state, frozen weights, batch) as shapes.
        sizes: bytes of the arguments that one device holds, by kind.
        trainable: number of trainable parameters.
        tokens: tokens of one step.
        seconds: how long tracing took.
    """

    mesh: jax.sharding.Mesh
    base: Base
    arguments: tuple[Any, Any, Any]
    traced: Any
    sizes: dict[str, int]
    trainable: int
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run needs of each device.

    Attributes:
        topology: its name.
        estimated: whether the memory was added up from the traced step because there is no compiler to ask.
        devices: number of devices in the mesh.
        peak_bytes_per_device: the most memory in use at one time: `argument_bytes` for the step's arguments, the rest
            temporary.
        host_bytes: host memory for what is offloaded to it.
        memory_bytes: memory that a device has for programs; None if not known.
        trainable_parameters, frozen_parameters: parameters of the whole model.
        bytes_by_kind: `argument_bytes` by kind of argument.
        received_bytes: what a device receives in a step, by kind of collective.
        flops, traffic_bytes: FLOPs and bytes of a step's products, over all devices.
        tokens: tokens of a step.
        cache_bytes_per_device: a rollout's keys and values, computed from their shapes; 0 if nothing is sampled.
        trace_seconds, compile_seconds: how long the forecast took to trace and to compile the step.
        seconds_per_step: a lower bound by the roofline model; None if the device's peaks are not known.
    """

    topology: str
    estimated: bool
    devices: int
    peak_bytes_per_device: int
    argument_bytes: int
    host_bytes: int
    memory_bytes: int | None
    trainable_parameters: int
    frozen_parameters: int
    bytes_by_kind: Mapping[str, int]
    received_bytes: Mapping[str, int]
    flops: float
    traffic_bytes: float
    tokens: int
    cache_bytes_per_device: int
    trace_seconds: float
    compile_seconds: float
    seconds_per_step: float | None

    @property
    def fits(self) -> bool | None:
        """Whether a device has enough memory; None if its memory is not known."""
        return None if self.memory_bytes is None else self.peak_bytes_per_device <= self.memory_bytes

    def to_json(self) -> dict[str, Any]:
        """Every field, and the values derived from them."""
        seconds = self.seconds_per_step
        return dataclasses.asdict(self) | {
            "fits": self.fits,
            "tokens_per_second": self.tokens / seconds if seconds else None,
        }


def forecast(config: RunConfig, topology: Topology) -> Forecast:
    """What the run needs on the topology's devices.

    Raises:
        UserError: whatever `jlora train` would refuse before it reads weights.
    """
    program = trace(config, topology)
    began = time.monotonic()
    compiled = _compiled(program, topology) if topology.has_compiler else None
    seconds = time.monotonic() - began
    arguments = sum(program.sizes.values())
    if compiled is None:
        peak, host, moved = arguments + _temporaries(program, topology), _temporaries(program, topology, host=True), {}
    else:
        peak, host, moved = compiled
    products = cost(program.traced.jaxpr.jaxpr, topology.device.platform)
    return Forecast(
        topology=topology.name,
        estimated=compiled is None,
        devices=program.mesh.size,
        peak_bytes_per_device=peak,
        argument_bytes=arguments,
        host_bytes=host,
        memory_bytes=topology.memory,
        trainable_parameters=program.trainable,
        frozen_parameters=tree.count(program.base.frozen),
        bytes_by_kind=program.sizes,
        received_bytes=moved,
        flops=products.flops,
        traffic_bytes=products.traffic,
        tokens=program.tokens,
        cache_bytes_per_device=_cache_bytes(config, program),
        trace_seconds=round(program.seconds, 3),
        compile_seconds=round(seconds, 3) if compiled else 0.0,
        seconds_per_step=_seconds(products, moved, host, program.mesh.size, topology),
    )


def trace(config: RunConfig, topology: Topology) -> Program:
    """The step of a run with these settings, traced from shapes."""
    began = time.monotonic()
    if config.model.dtype is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=topology.dtype))
    mesh = place(config, topology.devices()).mesh
    settings = dict(dtype=config.model.dtype, quant=config.model.quant, vocab=config.model.resize_vocab)
    model, params = hub.describe(config.model.path, mesh=mesh, **settings)
    if not config.adapters:
        params = jax.eval_shape(lambda params: adapt(model, params, config), params)
    base = based(config, model, params, mesh, place=_placed)
    plan = _plan(config)
    job = plan.start(base)
    total_steps = config.train.steps or plan.total_steps
    learning = (job.learn or learn)(config, base, job, total_steps)
    host_batch, tokens = job.source.read()
    batch = {name: _batch_shape(leaf, mesh) for name, leaf in host_batch.items()}
    arguments = (learning.state, job.frozen, batch)
    packed = list(filter(is_packed, tree.flatten(base.frozen).values()))
    sizes = {
        "base, packed": _held(packed),
        "base, not packed": _held(base.frozen) - _held(packed),
        "adapters" if config.lora else "trained weights": _held(learning.state.trainable),
        "optimizer": _held(learning.state.moments),
        "reference adapter" if config.lora else "reference weights": _held(base.reference),
        "batch": _held(batch),
    }
    sizes["counters, settings"] = max(0, _held(arguments) - sum(sizes.values()))
    return Program(
        mesh=mesh,
        base=base,
        arguments=arguments,
        traced=learning.step.trace(*arguments),
        sizes={name: size for name, size in sizes.items() if size},
        trainable=tree.count(learning.state.trainable),
        tokens=tokens,
        seconds=time.monotonic() - began,
    )


def _plan(config: RunConfig) -> Plan:
    one = ALGORITHMS[config.algorithm].fullest
    if not config.adapters:
        return one(config)
    return many.plan(config, None, lambda message: None, lambda member, tokenizer, note: one(member), {})


def _placed(params: Any, mesh: jax.sharding.Mesh) -> Any:
    return tree.abstract(params, sharding.tree_shardings(params, mesh))


def _batch_shape(leaf: np.ndarray, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """The leaf's shape with the sharding that `sharding.put_batch` gives it."""
    place = sharding.batch_sharding(mesh, leading=leaf.ndim - 2) if leaf.ndim >= 3 else sharding.replicated(mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _held(values: Any) -> int:
    """The bytes that one device holds of the values."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(values)
    )


def _compiled(program: Program, topology: Topology) -> tuple[int, int, dict[str, int]]:
    """(peak bytes per device, host bytes, received bytes by kind), from the compiled step."""
    try:
        compiled = program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:  # the TPU compiler refuses what does not fit, and says what it needs
        needed = _said_to_need(str(error), sum(program.sizes.values()))
        if needed is None:
            raise
        return needed, 0, {}
    memory = compiled.memory_analysis()
    host = sum(getattr(memory, f"host_{kind}_size_in_bytes", 0) for kind in ("argument", "output", "temp")) - getattr(
        memory, "host_alias_size_in_bytes", 0
    )
    device = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    peak = memory.peak_memory_in_bytes  # includes the host's part
    told = peak and topology.device.platform != "cpu"  # XLA's peak for CPUs leaves out the temporaries
    return min(device, peak) if told else device, max(host, 0), received(compiled.as_text())


def _said_to_need(message: str, arguments: int) -> int | None:
    """The bytes that a program needs on a device that has fewer; None if the compiler's error does not say."""
    forms = (
        (arguments, r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds"),
        (0, r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"),
    )
    for beside, form in forms:
        if found := re.search(form, message):
            return beside + int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
    return None


def _temporaries(program: Program, topology: Topology, host: bool = False) -> int:
    """An estimate of a device's (or the host's) memory for activations.

    It assumes that the mesh splits them by rows and along the sequence.
    """
    ways = sharding.row_ways(program.mesh) * sharding.token_ways(program.mesh)
    return live_bytes(program.traced.jaxpr.jaxpr, topology.device.platform, host) // ways


def _cache_bytes(config: RunConfig, program: Program) -> int:
    """Bytes of the keys and values of a rollout's rows, each as long as a training row."""
    if not ALGORITHMS[config.algorithm].samples:
        return 0
    rows = min(config.rollout.rows, config.train.batch_size * config.train.grad_accum)
    cache = jax.eval_shape(
        lambda params: program.base.model.empty_cache(params, rows, config.train.seq_len), program.base.frozen
    )
    return tree.nbytes(cache)


def _seconds(products: Cost, moved: Mapping[str, int], host: int, count: int, topology: Topology) -> float | None:
    """The roofline: the longest time among arithmetic, memory, chip links and host link.

    Each runs at its peak speed; None if the device's are not known.
    """
    device = topology.device
    if not device.flops or not device.bandwidth:
        return None
    times = [products.flops / count / device.flops, products.traffic / count / device.bandwidth]
    times += [sum(moved.values()) / device.links] if device.links else []
    times += [2 * host / device.host_link] if device.host_link else []
    return max(times)
