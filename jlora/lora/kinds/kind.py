"""What the rest of jlora knows about a kind of adapter: its leaves, and the functions that every kind may have."""

import dataclasses
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jlora.types import Params

if TYPE_CHECKING:
    from jlora.lora.config import LoraConfig
    from jlora.lora.targets import Target


class Leaf(NamedTuple):
    """A leaf that an adapter puts beside a module's own.

    Attributes:
        name: its name in the module; "lora_…_a" for a leaf [inputs, rank], "lora_…_b" for one [rank, outputs]. By these
            endings `jlora.sharding` places it.
        trained: whether it is trained; otherwise it is a setting, and frozen.
        axes: its axes after those of the stack: "inputs", "outputs", "rank" (which zeros may widen), "shard" (a rank
            that they may not), "tokens", "width".
        like_b: whether LoRA+ trains it at the learning rate of B.
        absent: where adapters are trained side by side, whether the leaf of one that lacks it may be filled with zeros:
            "never", in a "module" that this adapter leaves alone, or in "any" module.
        peft, peft_embedding: the end of its tensor's name in PEFT's files, beside a linear and beside an embedding.
        turned: whether that tensor is its transpose.
        decays: whether weight decay pulls it towards zero.
        scaled: whether `lora_scale` multiplies it, so that a file without scales has the product.
    """

    name: str
    trained: bool = False
    axes: tuple[str, ...] = ()
    like_b: bool = False
    absent: Literal["never", "module", "any"] = "never"
    peft: str = ""
    peft_embedding: str = ""
    turned: bool = False
    decays: bool = True
    scaled: bool = False

    @property
    def rank_axis(self) -> int | None:
        """Its axis of ranks, counted from the end; None if it has none."""
        return self.axes.index("rank") - len(self.axes) if "rank" in self.axes else None

    @property
    def is_factor(self) -> bool:
        """Whether it takes part in a matrix product: it has an axis of ranks, or of a shard's inputs."""
        return bool({"rank", "shard"} & set(self.axes))


# Settings of every kind that adds an update to a weight.
SCALE = Leaf("lora_scale", absent="module")
RANK = Leaf("lora_rank", absent="module")
DROPOUT = Leaf("lora_dropout", absent="any")
SETTINGS = (SCALE, RANK, DROPOUT)


class Call(NamedTuple):
    """A linear at work on its inputs.

    Attributes:
        module: its leaves, with trained copies in place of what they were copied from.
        key: turns on dropout.
        matmul: the product of rows with a kernel or a factor.
        sizes: how many rows each group has, if kernels come in groups (experts).
    """

    x: jax.Array
    module: Params
    key: jax.Array | None
    matmul: Callable[[jax.Array, Any], jax.Array]
    sizes: jax.Array | None = None

    @property
    def drops(self) -> bool:
        """Whether inputs of the update are dropped."""
        return self.key is not None and DROPOUT.name in self.module

    @property
    def dropped(self) -> jax.Array:
        """The inputs of the update: x, or what dropout leaves of it."""
        if not self.drops:
            return self.x
        rate = self.module[DROPOUT.name]
        keep = jax.random.bernoulli(self.key, 1 - rate, self.x.shape)
        return jnp.where(keep, self.x / (1 - rate), 0).astype(self.x.dtype)


class Output(NamedTuple):
    """A linear's output: the base's product, and what adapters add to it. Either may be missing."""

    base: jax.Array | None
    update: jax.Array | None = None

    def plus(self, more: jax.Array) -> "Output":
        """The output with `more` added by an adapter."""
        return self._replace(update=more if self.update is None else self.update + more)

    def total(self) -> jax.Array:
        """The sum in the base's dtype."""
        if self.update is None or self.base is None:
            return self.base if self.update is None else self.update
        return self.base + self.update.astype(self.base.dtype)


@dataclasses.dataclass(frozen=True)
class Start:
    """What new adapters start from.

    Attributes:
        leaves: path → leaf of the base and of the kinds started before.
        targets: the adapted modules, with their ranks and scales.
        dense, gradients: path → kernel before packing, or its gradient (see `jlora.lora.init`).
        directions: module → the directions that A starts from, if they come from data.
    """

    leaves: Mapping[str, Any]
    config: "LoraConfig"
    targets: "Sequence[Target]"
    key: jax.Array
    dense: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gradients: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    directions: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

    def key_of(self, path: str) -> jax.Array:
        """The module's own random key, which depends on nothing but the key and its path."""
        return jax.random.fold_in(self.key, zlib.crc32(path.encode()))


class Kind:
    """One way in which an adapter changes a module. A kind overrides what it does; by default it does nothing.

    Attributes:
        leaves: what it puts beside the module's leaves.
        title: what messages call it.
        peft_type: the value of PEFT's `peft_type` that the kind belongs to; "" if it goes with every type.
        peft_field: the field of PEFT's config that turns it on.
        additive: whether it adds something that `lora_scale` multiplies, and does nothing else.
        peft_names: config's field → PEFT's name of it, where a type of adapter has another than LoRA.
        peft_ignored: fields of PEFT's that say nothing more.
        peft_refused: PEFT's field → values of it that jlora does not compute.
        marked: whether beside an embedding it acts in a tied head only if `lora_tied` says so.
    """

    leaves: tuple[Leaf, ...] = ()
    title: str = ""
    peft_type: str = ""
    peft_field: str = ""
    peft_names: ClassVar[Mapping[str, str]] = {}
    peft_ignored: tuple[str, ...] = ()
    peft_refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    additive: bool = False
    marked: bool = True

    def wanted(self, config: Any) -> bool:
        """Whether a config asks for it: a `LoraConfig`, or that of a PEFT file."""
        return bool(self.peft_field and getattr(config, self.peft_field))

    def start(self, start: Start) -> dict[str, jax.Array]:
        """Path → new leaf, if it is wanted.

        Raises:
            ValueError: it cannot be where the config asks for it.
        """
        return {}

    def holds(self, name: str) -> bool:
        """Whether the leaf of this name is one of its own."""
        return any(name == leaf.name for leaf in self.leaves)

    def is_in(self, module: Collection[str]) -> bool:
        """Whether the module has trained leaves of this kind."""
        return any(leaf.trained and leaf.name in module for leaf in self.leaves)

    def changes(self, module: Mapping[str, Any]) -> set[str]:
        """The names of the base's leaves that it changes in a module."""
        return set()

    def output(self, output: Output, call: Call) -> Output:
        """The linear's output after it."""
        return output

    def rows(self, rows: jax.Array, tokens: jax.Array, module: Params) -> jax.Array:
        """An embedding's rows of these tokens after it."""
        return rows

    def logits(self, logits: jax.Array, x: jax.Array, module: Params) -> jax.Array:
        """The float32 logits of a tied head, whose embedding is `module`, after it."""
        return logits

    def merged(self, value: jax.Array, name: str, module: Params) -> jax.Array:
        """The leaf `name` of a module, stacked or not, after it: what makes `output` a plain product."""
        return value

    def as_product(self, module: Params) -> Params:
        """The module with this kind's leaves written as a plain product lora_a @ lora_b, if it can be."""
        return module


def row(vector: jax.Array, ndim: int) -> jax.Array:
    """The vector with as many axes, to be added to rows."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def over(scale: jax.Array, ndim: int) -> jax.Array:
    """One value for each layer with as many axes, to multiply a stack."""
    return scale.reshape(scale.shape + (1,) * (ndim - scale.ndim))
