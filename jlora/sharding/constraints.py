"""Placement constraints for code that does not know its mesh; they take effect when a mesh is in context.

Left alone, the compiler chooses which operand of a product to move: for a weight split over its inputs, it gathered
every row of the batch on every device and added up partial products, fourteen times the bytes of the weights.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.sharding.mesh import AXES, ROWS, TOKENS, WEIGHTS
from jlora.sharding.rules import MEANT, VOCABULARY, Sizes, leaf_specs

Axis = str | tuple[str, ...] | None


def jit(function: Callable, **settings: Any) -> Callable:
    """`jax.jit`, traced and run with the arguments' mesh in context.

    {"kernel": on a mesh of data=2, fsdp=4} → `constrain` inside holds arrays to that mesh; on one device it does
    nothing. The context is part of jax.jit's cache key, so the two do not mix.
    """
    compiled = jax.jit(function, **settings)

    def within(run: Callable) -> Callable:
        @functools.wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            with on(mesh_of((args, kwargs))):
                return run(*args, **kwargs)

        return call

    call = within(compiled)
    call.lower, call.trace, call._cache_size = within(compiled.lower), within(compiled.trace), compiled._cache_size
    return call


@contextlib.contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
    """Code traced inside holds its arrays to `mesh`; None leaves the context unchanged."""
    if mesh is None:
        yield
        return
    # Only the abstract mesh: with a concrete one, jax refuses arrays on one device beside those on the mesh.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def mesh_of(values: Any) -> Mesh | None:
    """The first mesh of several devices that one of a tree's arrays (or shapes) is on, else the first mesh, else None.

    A mesh of one device splits nothing, but tells the kind of device.
    """
    alone = None
    for leaf in jax.tree.leaves(values):
        placed = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(placed, NamedSharding):
            if placed.mesh.size > 1:
                return placed.mesh
            alone = alone or placed.mesh
    return alone


def sizes() -> Sizes:
    """The sizes of the axes over which the compiler divides arrays on the mesh in context.

    {} without a mesh of several devices. Manual axes (inside `jax.shard_map`) count as 1: arrays are already divided
    over them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
        return {}
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    found = {axis: mesh.shape[axis] if kinds[axis] is AxisType.Auto else 1 for axis in AXES}
    return {} if math.prod(found.values()) == 1 else found


def ways(*axes: str) -> int:
    """How many parts these axes of the mesh in context split an array into."""
    found = sizes()
    return math.prod(found.get(axis, 1) for axis in axes)


def split(size: int, axis: Axis) -> tuple[str, ...]:
    """The mesh axes among these over which `constrain` splits a dimension of this size."""
    return _dividing(size, _names(axis), found) if (found := sizes()) else ()


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """x with each dimension split over its mesh axes (those of them that divide it) and replicated over all others.

    Without a mesh in context, x itself. The gradient is constrained in the same way.

    Args:
        axes: for each dimension of x, one mesh axis, several, or None.
    """
    if not (found := sizes()):
        return x
    return jax.lax.with_sharding_constraint(x, _spec(x.shape, axes, found))


def held(x: jax.Array, width: Axis = None) -> jax.Array:
    """Activations [B, T, …, N] with rows and tokens placed as the batch's are, and N split over the axes of `width`.

    Arrays with fewer than three axes have no batch rows and are returned as they are.
    """
    return x if x.ndim < 3 else constrain(x, ROWS, TOKENS, *(None,) * (x.ndim - 3), width)


def is_spread(x: jax.Array) -> bool:
    """Whether the mesh in context splits rows or tokens of x [B, T, …]."""
    found = sizes()
    return bool(found) and x.shape[0] % ways(*ROWS) == 0 == x.shape[1] % ways(TOKENS) and ways(*ROWS, TOKENS) > 1


def apart(function: Callable[..., jax.Array], params: Any, *inputs: jax.Array) -> jax.Array:
    """function(params, *inputs) [B, T, …] for inputs that are `is_spread`, computed by each device for its own tokens.

    For functions that handle all tokens together (sort them, count them) but whose result for each token depends on
    that token alone. The inputs are [B, T, …].
    """
    place = PartitionSpec(ROWS, TOKENS)
    axes = {*ROWS, TOKENS}
    specs = (PartitionSpec(), *(place for _ in inputs))
    return jax.shard_map(function, in_specs=specs, out_specs=place, axis_names=axes)(params, *inputs)


def is_apart() -> bool:
    """Whether this is traced inside of `apart`, where a device has only its own tokens."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def logits_axes(vocabulary: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(mesh axes of the rows, mesh axes of the vocabulary) of logits.

    A head that is split over its vocabulary is not moved, so rows are gathered over the axes that split it.
    """
    if not (found := sizes()):
        return (), ()
    split = _dividing(vocabulary, MEANT[VOCABULARY], found)
    return tuple(axis for axis in ROWS if axis not in split), split


def gathered(module: str, leaves: dict) -> dict:
    """The leaves at a module's path, gathered over `fsdp` but still split over `tensor`.

    A packed leaf is gathered in its packed form. Gradients go back to where the leaves are.

    Call it where the leaves are used, inside what is recomputed: a layer's gathered weights then exist only for that
    layer, and are gathered once forward and once for recomputation and backward together.
    """
    if not (found := sizes()) or found[WEIGHTS] == 1:
        return leaves

    def gather(name: str, leaf: Any) -> Any:
        specs = leaf_specs(f"{module}/{name}" if module else name, leaf, found)
        return jax.tree.map(lambda part, spec: _gather(part, spec, _without_fsdp(spec)), leaf, specs)

    return {name: gather(name, leaf) for name, leaf in leaves.items()}


def _gather(x: jax.Array, before: PartitionSpec, after: PartitionSpec) -> jax.Array:
    if before == after:
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.with_sharding_constraint(x, after)
    return _gather_float(before, after, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_float(before: PartitionSpec, after: PartitionSpec, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, after)


def _gather_forward(before: PartitionSpec, after: PartitionSpec, x: jax.Array) -> tuple[jax.Array, None]:
    return _gather_float(before, after, x), None


def _gather_backward(before: PartitionSpec, after: PartitionSpec, _: None, grad: jax.Array) -> tuple[jax.Array]:
    """Sends partial sums straight to the device that keeps them, not to all."""
    return (jax.lax.with_sharding_constraint(grad, before),)


_gather_float.defvjp(_gather_forward, _gather_backward)


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    kept = [tuple(name for name in _names(axis) if name != WEIGHTS) for axis in spec]
    return PartitionSpec(*(names or None for names in kept))


def _spec(shape: tuple[int, ...], axes: tuple[Axis, ...], found: Sizes) -> PartitionSpec:
    if len(axes) != len(shape):
        raise ValueError(f"found axes {axes} for an array of shape {shape}, expected one entry a dimension")
    return PartitionSpec(
        *(_dividing(size, _names(axis), found) or None for size, axis in zip(shape, axes, strict=True))
    )


def _dividing(size: int, names: tuple[str, ...], found: Sizes) -> tuple[str, ...]:
    """The axes, taken in order, that together divide a dimension of this size."""
    kept: tuple[str, ...] = ()
    for name in names:
        if found[name] > 1 and size % math.prod(found[each] for each in (*kept, name)) == 0:
            kept = (*kept, name)
    return kept


def _names(axis: Axis) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis
