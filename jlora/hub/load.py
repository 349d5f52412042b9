"""A model off the Hub as `(model, params)`, each tensor cast, packed and placed as it is read: the host holds one."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import models, sharding, tree
from jlora.hub import names
from jlora.hub.source import Source, check_tensors, open_source
from jlora.quant import QuantConfig, as_config, leaf_format, quantize
from jlora.types import Params

if TYPE_CHECKING:
    from jlora.models import Model

FLOATS = ("bfloat16", "float16", "float32")


class Packing(NamedTuple):
    """How one tensor of the checkpoint becomes (a layer of) a leaf."""

    transposed: bool
    dtype: np.dtype
    format: str | None
    double_quant: bool
    shardings: tuple[NamedSharding, ...] | None


def load(
    source: str | Path,
    dtype: jax.typing.DTypeLike | None = None,
    quant: str | QuantConfig | None = None,
    mesh: Mesh | None = None,
) -> tuple["Model", Params]:
    """The model and its params from a Hugging Face folder, a Hub id or a GGUF file.

    Args:
        dtype: of every leaf; None is bfloat16 on TPU and GPU, float32 on CPU.
        quant: which leaves are packed, from the values rounded to `dtype`.
        mesh: places every leaf by `jlora.sharding`; None leaves them on the default device.

    Raises:
        FileNotFoundError: the checkpoint or files of it are missing.
        ValueError: files are broken, the model is of an unknown kind, or tensors do not fit it; all are listed.
    """
    dtype = float_dtype(dtype, mesh)
    checkpoint = open_source(source)
    _refuse_packed(source, checkpoint)
    model = _build(checkpoint)
    config = as_config(quant)
    leaves = tree.flatten(model.abstract_params(dtype, _stacks(model, config)))
    tensors = {path: names.hub_tensors(path, leaf.shape, model.config.model_type) for path, leaf in leaves.items()}
    _check(checkpoint, tensors)
    params = {path: _load_leaf(checkpoint, path, leaf, tensors[path], config, mesh) for path, leaf in leaves.items()}
    return model, tree.unflatten(params)


def float_dtype(dtype: jax.typing.DTypeLike | None, mesh: Mesh | None = None) -> np.dtype:
    """The dtype that `dtype` names; None is what the devices at hand multiply fastest.

    Raises:
        ValueError: not one of bfloat16, float16, float32.
    """
    if dtype is None:
        platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
        dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in FLOATS:
        raise ValueError(f"dtype={dtype!r} cannot hold a model; expected one of {', '.join(FLOATS)}, or None")
    return found


def _refuse_packed(source: str | Path, checkpoint: Source) -> None:
    packed = checkpoint.config.get("quantization_config")
    if packed:
        method = packed.get("quant_method", "an unnamed method") if isinstance(packed, dict) else packed
        raise ValueError(f"{source} is already quantised ({method}); give the original checkpoint and quant='nf4'")


def _build(checkpoint: Source) -> "Model":
    """The model, which ends a text where generation_config.json says so: chat models often have more ends than one."""
    generation = checkpoint.generation_config
    if not generation:
        return models.build(checkpoint.config)
    model = models.build(checkpoint.config | {"generation_config": generation})
    ends = generation.get("eos_token_id")
    if ends is None:
        return model
    config = dataclasses.replace(model.config, eos_token_ids=(ends,) if isinstance(ends, int) else tuple(ends))
    return dataclasses.replace(model, config=config)


def _stacks(model: "Model", config: QuantConfig | None) -> tuple[range, ...]:
    """The layers of each stack: those that agree in structure and in the format of every leaf."""
    total = model.config.num_hidden_layers
    signatures: list[dict[str, str | None]] = [{} for _ in range(total)]
    for path in tree.flatten(model.abstract_params()):
        if stack := tree.stack_of(path):
            for layer in stack.indices(total):
                signatures[layer][stack.rest] = leaf_format(path, config, layer)
    return tuple(tree.stack_ranges([tuple(signature.items()) for signature in signatures]))


def _check(checkpoint: Source, tensors: dict[str, list[names.HubTensor]]) -> None:
    expected = {tensor.name: tensor.shape for members in tensors.values() for tensor in members}
    checkpoint.rename(names.without_prefix(expected, checkpoint.tensors))
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    harmless = {name for name in checkpoint.tensors if names.is_harmless(name, tied=tied)}
    check_tensors(checkpoint.tensors, expected, harmless=harmless)


def _load_leaf(
    checkpoint: Source,
    path: str,
    leaf: jax.ShapeDtypeStruct,
    tensors: list[names.HubTensor],
    config: QuantConfig | None,
    mesh: Mesh | None,
) -> Any:
    """One leaf, its layers written one after another into a buffer that is given up and returned every time."""
    double_quant = config is not None and config.double_quant
    packing = Packing(tensors[0].transposed, np.dtype(leaf.dtype), leaf_format(path, config), double_quant, None)
    whole = jax.eval_shape(functools.partial(_pack, packing=packing._replace(transposed=False)), leaf)
    leading = len(tensors[0].index)
    placement = None
    if mesh is not None:
        packing = packing._replace(shardings=tuple(jax.tree.leaves(sharding.leaf_sharding(path, whole, mesh))))
        placement = _placement(path, leaf, mesh, leading=leading, transposed=packing.transposed)
    if not leading:
        return _convert(_put(checkpoint.read(tensors[0].name), placement), packing)
    parts, structure = jax.tree.flatten(whole)
    buffer = jax.tree.unflatten(structure, _zeros(tuple(parts), packing.shardings))
    for index, members in itertools.groupby(tensors, lambda tensor: tensor.index):
        # Some leaves lie on the Hub as several tensors of columns.
        pieces = [checkpoint.read(tensor.name) for tensor in members]
        values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0 if packing.transposed else -1)
        # Without the wait, reading would run ahead of the device and the host would hold many tensors.
        buffer = jax.block_until_ready(_write(buffer, _put(values, placement), index, packing))
    return buffer


def _placement(path: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh, *, leading: int, transposed: bool) -> NamedSharding:
    """Where the checkpoint's tensor goes, so that each device is sent only the part that it will keep."""
    axes = list(sharding.leaf_sharding(path, leaf, mesh).spec)
    axes += [None] * (len(leaf.shape) - len(axes))
    axes = axes[leading:]
    return NamedSharding(mesh, PartitionSpec(*(axes[::-1] if transposed else axes)))


def _put(values: np.ndarray, placement: NamedSharding | None) -> jax.Array:
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    if placement is None:
        return jnp.asarray(values)
    return jax.make_array_from_callback(values.shape, placement, lambda index: values[index])


def _pack(values: jax.Array, packing: Packing) -> Any:
    values = values.T if packing.transposed else values
    values = values.astype(packing.dtype)
    if packing.format is None:
        return values
    return quantize(values, packing.format, double_quant=packing.double_quant)


def _constrain(value: Any, packing: Packing) -> Any:
    if packing.shardings is None:
        return value
    parts, structure = jax.tree.flatten(value)
    placed = [jax.lax.with_sharding_constraint(part, s) for part, s in zip(parts, packing.shardings, strict=True)]
    return jax.tree.unflatten(structure, placed)


@functools.partial(jax.jit, static_argnames=("packing",))
def _convert(raw: jax.Array, packing: Packing) -> Any:
    return _constrain(_pack(raw, packing), packing)


@functools.partial(jax.jit, static_argnames=("packing",), donate_argnames=("buffer",))
def _write(buffer: Any, raw: jax.Array, index: tuple[jax.Array, ...], packing: Packing) -> Any:
    """The buffer with `raw` packed at `index` of its leading axes."""

    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        start = (*index, *[0] * part.ndim)
        return jax.lax.dynamic_update_slice(whole, part.reshape((1,) * len(index) + part.shape), start)

    return _constrain(jax.tree.map(write, buffer, _pack(raw, packing)), packing)


@functools.partial(jax.jit, static_argnames=("parts", "shardings"))
def _zeros(parts: tuple[jax.ShapeDtypeStruct, ...], shardings: tuple[NamedSharding, ...] | None) -> tuple:
    zeros = [jnp.zeros(part.shape, part.dtype) for part in parts]
    if shardings is None:
        return tuple(zeros)
    return tuple(jax.lax.with_sharding_constraint(z, s) for z, s in zip(zeros, shardings, strict=True))
