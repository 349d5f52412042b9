"""Loads Hub models as `(model, params)`; tensors are cast, packed and placed one by one, so the host holds only one."""

import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import models, sharding, tree
from jlora.errors import UserError, describe_faults
from jlora.families import kinds
from jlora.hub.checkpoints import names
from jlora.hub.checkpoints.beside import half_of, say_left_alone
from jlora.hub.checkpoints.forms import Form, Forms, chosen_forms, form_of, laid_over, stack_layers, stored_forms
from jlora.hub.checkpoints.fp8 import is_fp8, say_unscaled
from jlora.hub.checkpoints.methods import read_packed, said_quant, stored_tensors
from jlora.hub.checkpoints.resize import Vocab, grown, resized
from jlora.hub.checkpoints.score import is_scored, scored_leaves
from jlora.hub.checkpoints.source import Description, Source, check_tensors, open_description, open_source
from jlora.hub.checkpoints.stacked import take_apart
from jlora.hub.checkpoints.stored import Stored
from jlora.hub.checkpoints.weights import DTYPES, SafetensorsFolder
from jlora.names import FLOATS
from jlora.quant import QuantConfig, Rounded, as_config, is_packed, quantize
from jlora.types import Params

if TYPE_CHECKING:
    from jlora.models import Model

BYTES = ("U8", "I8")  # dtypes of packed tensors
MANY = 100


class Packing(NamedTuple):
    """How one tensor of the checkpoint becomes (a layer of) a leaf; without an order, its axes stay as they are."""

    order: tuple[int, ...] | None
    form: Form
    shardings: tuple[NamedSharding, ...] | None


def load(
    source: str | Path,
    dtype: jax.typing.DTypeLike | None = None,
    quant: str | QuantConfig | None = None,
    mesh: Mesh | None = None,
    *,
    vocab: Vocab = None,
) -> tuple["Model", Params]:
    """Loads the model and its params from a Hugging Face folder, a Hub id or a GGUF file.

    Reward models (…ForSequenceClassification with one label) come with score/kernel, which Model.score applies; they
    have no head for logits unless head and embedding are tied.

    Args:
        dtype: the dtype of every leaf; None is bfloat16 on TPU and GPU, float32 on CPU.
        quant: which leaves to pack, from their values rounded to `dtype`. Experts that are in MXFP4 stay as they are,
            bit by bit, whatever it says of them. Must be None for a checkpoint that bitsandbytes has packed.
        mesh: places every leaf by `jlora.sharding`; None leaves them on the default device.
        vocab: the number of rows of embedding and head, or "tokenizer" for as many as the source's tokenizer needs. New
            rows are the mean of the others. None leaves them as they are.

    Raises:
        FileNotFoundError: the checkpoint or some of its files are missing.
        ValueError: files are broken, the kind of model is unknown, or tensors do not fit it; all are listed.
    """
    checkpoint = open_source(source)
    contents = _contents(source, checkpoint, float_dtype(dtype, mesh), as_config(quant), vocab)
    if isinstance(checkpoint, SafetensorsFolder):
        say_left_alone(checkpoint)
        say_unscaled(checkpoint)
    return contents.model, tree.unflatten({path: contents.load(path, mesh) for path in contents.leaves})


def describe(
    source: str | Path,
    dtype: jax.typing.DTypeLike | None = None,
    quant: str | QuantConfig | None = None,
    mesh: Mesh | None = None,
    *,
    vocab: Vocab = None,
) -> tuple["Model", Params]:
    """What `load` returns, with shapes, dtypes and shardings instead of arrays.

    The source needs only config.json; from a Hub id only it and generation_config.json are fetched, but the whole
    snapshot if `vocab` is "tokenizer".

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    contents = _contents(source, open_description(source), float_dtype(dtype, mesh), as_config(quant), vocab)
    params = tree.unflatten({path: contents.abstract(path) for path in contents.leaves})
    if mesh is None:
        return contents.model, params
    return contents.model, tree.abstract(params, sharding.tree_shardings(params, mesh))


class Contents(NamedTuple):
    """A checkpoint that fits its model.

    Attributes:
        leaves: path → the leaf before it is packed.
        tensors: path → the tensors that the leaf is made of.
        stored: name → tensor, for those that are already packed.
        read: (a tensor's name) → its values.
    """

    model: "Model"
    leaves: dict[str, jax.ShapeDtypeStruct]
    tensors: dict[str, list[names.HubTensor]]
    forms: Forms
    stored: dict[str, Stored]
    read: Callable[[str], Any]

    def abstract(self, path: str) -> Any:
        """The leaf's shapes and dtypes as they will be kept."""
        return _abstract(self.leaves[path], form_of(self.forms, path))

    def load(self, path: str, mesh: Mesh | None) -> Any:
        """The leaf, read, packed and placed."""
        return _load_leaf(self.read, path, self.leaves[path], self.tensors[path], form_of(self.forms, path), mesh)


def _contents(
    source: str | Path, checkpoint: Source | Description, dtype: np.dtype, config: QuantConfig | None, vocab: Vocab
) -> Contents:
    described = isinstance(checkpoint, Description)
    stored = {} if described else stored_tensors(source, checkpoint, config)
    said = said_quant(checkpoint.config) if described and not is_fp8(checkpoint.config) else None
    model = _build(checkpoint)
    leaves = _leaves(model, checkpoint, dtype)
    tensors = _hub_tensors(model, leaves)
    if not described:
        _require_plausible(leaves, checkpoint)
        stored = _check(checkpoint, tensors, stored)
    model = resized(model, source, vocab)
    leaves = _leaves(model, checkpoint, dtype)
    packed = chosen_forms(leaves, said, dtype) if described else stored_forms(leaves, tensors, stored, dtype)
    forms = laid_over(chosen_forms(leaves, config, dtype), packed)
    leaves = _leaves(model, checkpoint, dtype, stack_layers(forms, model.config.structures))
    tensors = _hub_tensors(model, leaves)

    def read(name: str) -> Any:
        return read_packed(stored[name], dtype) if name in stored else checkpoint.read(name)

    return Contents(model, leaves, tensors, forms, stored, _grown(read, model, tensors, stored))


def read_model(source: str | Path, vocab: Vocab = None) -> "Model":
    """The model that `load` would return, without its params.

    No weights are read, except a head that may repeat the embedding: the two are compared block by block, once per
    process.

    Raises:
        FileNotFoundError, ValueError: as `load`, except for faults of the weights.
    """
    return resized(_build(open_source(source)), source, vocab)


def describe_model(source: str | Path, vocab: Vocab = None) -> "Model":
    """The model that `describe` would return; config.json is enough.

    Raises:
        FileNotFoundError, ValueError: as `describe`, except for faults of the weights.
    """
    return resized(_build(open_description(source)), source, vocab)


def float_dtype(dtype: jax.typing.DTypeLike | None, mesh: Mesh | None = None) -> np.dtype:
    """The dtype that `dtype` names; None gives float32 on CPU and bfloat16 elsewhere, which multiply fastest there.

    Raises:
        ValueError: `dtype` is not one of bfloat16, float16, float32.
    """
    if dtype is None:
        platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
        dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in FLOATS:
        raise UserError(f"dtype={dtype!r} cannot hold a model; expected one of {', '.join(FLOATS)}, or None")
    return found


def checkpoint_dtype(source: str | Path) -> np.dtype:
    """The dtype in which to write a model made from the checkpoint.

    It is the one that config.json names; if that cannot hold a model, the one that the largest tensor is stored in, and
    bfloat16 for a GGUF file with packed blocks.
    """
    checkpoint = open_source(source)
    name = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    return jnp.dtype(name) if name in FLOATS else _stored_in(checkpoint) or jnp.dtype(jnp.bfloat16)


def exact_dtype(source: str | Path) -> np.dtype:
    """The dtype in which the matrices load without loss.

    It is the one that they are stored in; float32 if they differ, and for a GGUF file with packed blocks.
    """
    checkpoint = open_source(source)
    matrices = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) > 1 and info.dtype not in BYTES}
    return (_stored_in(checkpoint) if len(matrices) == 1 else None) or jnp.dtype(jnp.float32)


def _stored_in(checkpoint: Source) -> np.dtype | None:
    """The dtype of the largest tensor; None if there are no tensors, or a GGUF file has some in packed blocks."""
    tensors = [info for info in checkpoint.tensors.values() if info.dtype not in BYTES]
    if not tensors or not all(info.dtype in DTYPES for info in tensors):
        return None
    found = DTYPES[max(tensors, key=lambda info: int(np.prod(info.shape))).dtype]
    return found if found.name in FLOATS else jnp.dtype(jnp.float32)


def _build(checkpoint: Source | Description) -> "Model":
    """The model, with the end tokens of generation_config.json if it has some: chat models often have several."""
    generation = checkpoint.generation_config
    model = models.build(checkpoint.config | ({"generation_config": generation} if generation else {}))
    if half_of(checkpoint.config):
        folder = str(checkpoint.folder.resolve())
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, folder=folder))
    if not generation:
        return model
    ends = generation.get("eos_token_id")
    if wrong := kinds.wrong(kinds.TOKENS, "eos_token_id", ends):
        raise UserError(describe_faults("generation_config.json", wrong))
    if ends is None:
        return model
    config = dataclasses.replace(model.config, eos_token_ids=(ends,) if isinstance(ends, int) else tuple(ends))
    return dataclasses.replace(model, config=config)


def _leaves(
    model: "Model", checkpoint: Source | Description, dtype: np.dtype, stacks: tuple[range, ...] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path → the leaf to read from the checkpoint."""
    leaves = tree.flatten(model.abstract_params(dtype, stacks))
    if not is_scored(checkpoint):
        return leaves
    heads = [path for path, tensors in _hub_tensors(model, leaves).items() if tensors[0].name in checkpoint.tensors]
    return scored_leaves(model, leaves, heads)


def _require_plausible(leaves: dict[str, jax.ShapeDtypeStruct], checkpoint: Source) -> None:
    """Raises UserError if the model needs many times the tensors that there are: their names would fill the memory."""
    needed = 0
    for path, leaf in leaves.items():
        stacked = tree.stack_of(path) is not None
        experts = leaf.shape[stacked] if re.fullmatch(names.EXPERTS, path.rpartition("/")[0]) else 1
        needed += (leaf.shape[0] if stacked else 1) * experts
    if needed > MANY * len(checkpoint.tensors) + MANY:
        raise UserError(
            f"config.json describes {needed:,} tensors, the checkpoint holds {len(checkpoint.tensors)}: check "
            "the numbers of layers and experts"
        )


def _hub_tensors(model: "Model", leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, list[names.HubTensor]]:
    return {path: names.hub_tensors(path, leaf.shape, model.config.model_type) for path, leaf in leaves.items()}


def _check(
    checkpoint: Source, tensors: dict[str, list[names.HubTensor]], stored: dict[str, Stored]
) -> dict[str, Stored]:
    """The packed tensors by the model's names for them. Raises UserError unless the checkpoint fits the model."""
    members = {tensor.name: tensor for tensors_of_leaf in tensors.values() for tensor in tensors_of_leaf}
    renamed = names.without_prefix(members, checkpoint.tensors.keys() | stored.keys())
    checkpoint.rename({new: old for new, old in renamed.items() if old in checkpoint.tensors})
    if isinstance(checkpoint, SafetensorsFolder):
        take_apart(checkpoint, members)
    ours = {old: new for new, old in renamed.items()}
    stored = {ours.get(name, name): packed for name, packed in stored.items()}
    companions = {name for packed in stored.values() for name in packed.names} - stored.keys() - set(renamed.values())
    found = {name: info for name, info in checkpoint.tensors.items() if name not in companions}
    expected = {name: tensor.shape for name, tensor in members.items()}
    for name, packed in stored.items():
        found[name] = packed.info
        if name in members and not members[name].transposed and not packed.stack:
            expected[name] = expected[name][::-1]
    kind = checkpoint.config.get("model_type")
    harmless = {name for name in found if names.is_harmless(name, kind)}
    check_tensors(found, expected, harmless=harmless)
    return stored


def _grown(
    read: Callable[[str], Any],
    model: "Model",
    tensors: dict[str, list[names.HubTensor]],
    stored: dict[str, Stored],
) -> Callable[[str], Any]:
    """`read`, with embeddings and head grown to the model's number of rows."""
    of_model = model.config.names
    own = (of_model.layer_inputs.embedding,) if of_model.layer_inputs else ()
    paths = (*(f"{path}/embedding" for path in (of_model.embedding, *own)), f"{of_model.head}/kernel")
    wide = {tensor.name for path in paths for tensor in tensors.get(path, ())}
    packed = sorted(wide & stored.keys())
    if packed and model.config.vocab_size != stored[packed[0]].matrix[-1]:
        raise UserError(f"vocab: {', '.join(packed)} is packed and cannot get more rows; give the original checkpoint")
    return grown(read, wide - stored.keys(), model.config.vocab_size)


def _load_leaf(
    read: Callable[[str], Any],
    path: str,
    leaf: jax.ShapeDtypeStruct,
    tensors: list[names.HubTensor],
    form: Form,
    mesh: Mesh | None,
) -> Any:
    """One leaf; its layers are written one at a time into a buffer that each write donates and returns."""
    packing = Packing(tensors[0].order, form, None)
    whole = _abstract(leaf, form)
    leading = len(tensors[0].index)
    if mesh is not None:
        packing = packing._replace(shardings=tuple(jax.tree.leaves(sharding.leaf_sharding(path, whole, mesh))))
    put = functools.partial(_sent, path=path, leaf=leaf, packing=packing, leading=leading, mesh=mesh)
    if not leading:
        return _convert(put(read(tensors[0].name)), packing)
    parts, structure = jax.tree.flatten(whole)
    buffer = jax.tree.unflatten(structure, _zeros(tuple(parts), packing.shardings))
    for index, members in itertools.groupby(tensors, operator.attrgetter("index")):
        # Some leaves are several tensors on the Hub, each with some of the columns.
        pieces = [read(tensor.name) for tensor in members]
        values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0 if tensors[0].transposed else -1)
        # Wait, or reading would run ahead of the device and the host would hold many tensors.
        buffer = jax.block_until_ready(_write(buffer, put(values), index, packing))
    return buffer


def _sent(
    values: Any, *, path: str, leaf: jax.ShapeDtypeStruct, packing: Packing, leading: int, mesh: Mesh | None
) -> Any:
    """A tensor of the leaf on the devices, each part where it will be written; the leaf has `leading` axes more."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, values)
    if is_packed(values):
        return _put(values, [NamedSharding(mesh, PartitionSpec(*s.spec[leading:])) for s in packing.shardings])
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    return _put(values, [_placement(path, leaf, mesh, leading=leading, order=packing.order)])


def _placement(
    path: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh, *, leading: int, order: Sequence[int]
) -> NamedSharding:
    """The sharding of a checkpoint tensor by which each device is sent only the part that it will keep."""
    axes = list(sharding.leaf_sharding(path, leaf, mesh).spec)
    axes += [None] * (len(leaf.shape) - len(axes))
    axes = axes[leading:]
    return NamedSharding(mesh, PartitionSpec(*(axes[i] for i in order)))


def _put(values: Any, placements: Sequence[NamedSharding]) -> Any:
    """`values` with each part placed; a dense tensor is a single part."""
    parts, structure = jax.tree.flatten(values)
    placed = [
        jax.make_array_from_callback(part.shape, placement, lambda index, part=part: part[index])
        for part, placement in zip(parts, placements, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def _abstract(leaf: jax.ShapeDtypeStruct, form: Form) -> Any:
    """The shapes and dtypes of the packed leaf."""
    return jax.eval_shape(functools.partial(_pack, packing=Packing(None, form, None)), leaf)


def _pack(values: Any, packing: Packing) -> Any:
    if is_packed(values):
        return values
    values = values if packing.order is None else values.transpose(packing.order)
    values = values.astype(packing.form.dtype)
    if packing.form.format is None:
        return values
    if packing.form.merge_aware:
        return Rounded(values, packing.form.format, packing.form.double_quant)
    return quantize(values, packing.form.format, double_quant=packing.form.double_quant)


def _constrain(value: Any, packing: Packing) -> Any:
    if packing.shardings is None:
        return value
    parts, structure = jax.tree.flatten(value)
    placed = [jax.lax.with_sharding_constraint(part, s) for part, s in zip(parts, packing.shardings, strict=True)]
    return jax.tree.unflatten(structure, placed)


@functools.partial(jax.jit, static_argnames=("packing",))
def _convert(raw: Any, packing: Packing) -> Any:
    return _constrain(_pack(raw, packing), packing)


@functools.partial(jax.jit, static_argnames=("packing",), donate_argnames=("buffer",))
def _write(buffer: Any, raw: Any, index: tuple[jax.Array, ...], packing: Packing) -> Any:
    """The buffer with `raw`, packed, written at `index` of its leading axes."""

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
