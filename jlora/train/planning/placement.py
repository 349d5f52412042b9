"""One check, before anything is loaded, that a run's settings, its model and the available devices fit together."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora import hub, sharding
from jlora.errors import UserError, raise_all
from jlora.kernels import attention
from jlora.kernels.device import kind_of
from jlora.models import ModelConfig
from jlora.models.mixers import MIXERS
from jlora.sharding import MeshConfig
from jlora.train.algorithms import ALGORITHMS
from jlora.train.config import RunConfig

SHOWN = 3  # the most meshes that a message proposes


class Placement(NamedTuple):
    """Where a run computes.

    Attributes:
        notes: what the mesh does not divide, and so is whole on every device or gathered.
    """

    mesh: jax.sharding.Mesh
    notes: tuple[str, ...]

    @property
    def sizes(self) -> MeshConfig:
        """The sizes of the mesh's axes, with a number in place of -1."""
        return MeshConfig(**self.mesh.shape)


def place(config: RunConfig, devices: Sequence[Any]) -> Placement:
    """The mesh of a run on these devices. Only the model's config.json is read.

    Raises:
        UserError: the devices cannot form the mesh; rows or tokens do not divide over it; one of its axes splits
            nothing of the model; the form of attention cannot be used there; the model cannot be opened. All in one
            message.
    """
    faults, mesh, model = [], None, None
    try:
        model = hub.describe_model(config.model.path, config.model.resize_vocab).config
    except UserError as error:
        faults.append(str(error))
    try:
        mesh = sharding.make_mesh(config.mesh, list(devices))
    except UserError as error:
        faults.insert(0, f"{error}; {_proposed(config, model, len(devices))}")
    sizes = MeshConfig(**mesh.shape) if mesh else config.mesh
    faults += _batch_faults(config, sizes)
    if model is not None and sizes.tensor > 1 and all(size % sizes.tensor for size in _outputs(model).values()):
        faults.append(f"mesh.tensor={sizes.tensor} splits nothing of this model: {_listed(_outputs(model))}")
    try:
        _require_form(config, mesh, kind_of(devices[0].platform), model)
    except UserError as error:
        faults.append(f"model.attention: {error}")
    raise_all(faults)
    return Placement(mesh, tuple(_notes(model, sizes)))


def _batch_faults(config: RunConfig, mesh: MeshConfig) -> Iterator[str]:
    """A fault for rows or tokens that do not divide over the mesh; axes of unknown size (-1) are not checked."""
    train, rows, tokens = config.train, mesh.data * mesh.fsdp, mesh.sequence
    if rows > 0 and train.batch_size % rows:
        yield f"train.batch_size is {train.batch_size}: not a multiple of mesh.data × mesh.fsdp = {rows}"
    if tokens > 0 and train.seq_len % tokens:
        yield f"train.seq_len is {train.seq_len}: not a multiple of mesh.sequence = {tokens}"
    bucket = config.data.bucket
    if tokens > 0 and bucket < train.seq_len and bucket % tokens:
        yield (
            f"data.bucket is {bucket}: row lengths are multiples of it, and it is not one of mesh.sequence = "
            f"{tokens}; set {math.lcm(bucket, tokens)}"
        )


def _require_form(config: RunConfig, mesh: jax.sharding.Mesh | None, device: str, model: ModelConfig | None) -> None:
    """Raises UserError if the form of attention cannot compute the training rows on the device."""
    form = config.model.attention
    if mesh is None or model is None:
        attention.require(form, device)
        return
    rows = jax.ShapeDtypeStruct((config.train.batch_size, config.train.seq_len), np.int32)
    windows = tuple(dict.fromkeys(layer.window for layer in model.layers))
    branches = ALGORITHMS[config.algorithm].branches
    marks = attention.Marks(rows, rows, rows, rows, windows=windows, branches=branches)
    with sharding.on(mesh):
        for heads in {model.heads(layer) for layer in model.layers if MIXERS[layer.mixer].attends}:
            attention.require(form, device, marks, heads.queries, heads.width)


def _outputs(model: ModelConfig) -> dict[str, int]:
    """The sizes of a model that `mesh.tensor` splits."""
    experts = model.experts.intermediate_size if model.experts else model.intermediate_size
    return {
        "heads × head_dim": model.num_attention_heads * model.head_dim,
        "intermediate_size": experts,
        "vocab_size": model.vocab_size,
    }


def _undivided(model: ModelConfig, ways: int) -> dict[str, int]:
    """The sizes that `mesh.tensor` does not divide: the weights that have them are whole on every device."""
    heads = {name: getattr(model, name) for name in ("num_attention_heads", "num_key_value_heads")}
    return {name: count for name, count in (heads | _outputs(model)).items() if count % ways}


def _notes(model: ModelConfig, mesh: MeshConfig) -> Iterator[str]:
    if mesh.tensor > 1 and (whole := _undivided(model, mesh.tensor)):
        yield (
            f"mesh.tensor={mesh.tensor} does not divide {_listed(whole)}: every device holds and computes all of them, "
            "which gives the same numbers for more memory and time"
        )
    if mesh.sequence > 1 and model.num_attention_heads % (ways := mesh.tensor * mesh.sequence):
        yield (
            f"mesh.tensor × mesh.sequence = {ways} does not divide num_attention_heads {model.num_attention_heads}: in "
            "attention every device gathers the keys and values of all tokens, rather than taking all tokens of some "
            "heads"
        )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _proposed(config: RunConfig, model: ModelConfig | None, count: int) -> str:
    """Advice on meshes to try: those that divide everything or, if there are none, those that the devices can form."""

    def works(mesh: MeshConfig) -> bool:
        return not [*_batch_faults(config, mesh)] and not (model and _undivided(model, mesh.tensor))

    if found := nearest(config.mesh, count, works):
        return f"try {', or '.join(map(flags, found))}"
    return f"try {', or '.join(map(flags, nearest(config.mesh, count)))}, with a batch that divides over it"


def nearest(asked: MeshConfig, count: int, works: Callable[[MeshConfig], bool] = lambda mesh: True) -> list[MeshConfig]:
    """The few meshes of `count` devices that work and are closest to the requested one.

    Closest first in the axes other than fsdp, which takes what is left.
    """
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    meshes = (
        MeshConfig(data, count // (data * tensor * sequence), tensor, sequence)
        for data, tensor, sequence in itertools.product(divisors, repeat=3)
        if count % (data * tensor * sequence) == 0
    )

    def far(mesh: MeshConfig) -> tuple[float, float]:
        steps = {
            axis: 0.0 if old == -1 else abs(math.log2(getattr(mesh, axis) / old)) for axis, old in vars(asked).items()
        }
        return sum(steps.values()) - steps["fsdp"], steps["fsdp"]

    return sorted(filter(works, meshes), key=far)[:SHOWN]


def flags(config: MeshConfig) -> str:
    """The mesh as command-line options, without axes of size 1."""
    given = [f"--config.mesh.{axis}={size}" for axis, size in vars(config).items() if size != 1]
    return " ".join(given) or "--config.mesh.fsdp=1"
