"""What can be adapted in a tree: its sites, found once; and whether its embedding is its head too."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jlora import tree
from jlora.errors import UserError
from jlora.families import each
from jlora.types import Params

# The leaves that an update can be added to.
MAIN = ("kernel", "embedding", "router")
# Embedding → the head that shares its weight if the tree has no head of its own.
TIED_HEADS = dict(each(lambda family: (family.names.embedding, family.names.head)))
# Prefixes that Hugging Face's causal-LM classes put before a module's own name; patterns match with or without them.
HUB_PREFIXES = ("", *each(lambda family: family.prefix))

InputAxes = Sequence[tuple[str, int]]


class Tie(NamedTuple):
    """The embedding and the head of a language model.

    Attributes:
        embedding, head: their modules' paths; the head's is where an adapter of its own lies, even if it has no weight.
        tied: whether the embedding's weight is the head's too.
    """

    embedding: str
    head: str
    tied: bool

    @property
    def weight(self) -> str:
        """The path of the embedding's weight."""
        return f"{self.embedding}/embedding"

    @property
    def modules(self) -> tuple[str, str]:
        """Both modules."""
        return self.embedding, self.head

    def leaf(self, leaves: Mapping[str, Any], module: str) -> tuple[str, Any] | None:
        """(path, leaf) of the weight of one of the two in these leaves; None if it has none of its own."""
        path = self.weight if module == self.embedding else f"{self.head}/kernel"
        return (path, leaves[path]) if path in leaves else None


def tie(leaves: Mapping[str, Any]) -> Tie | None:
    """The pair in a tree's leaves, by path; None if it has no input embedding with a name that jlora knows.

    Only jlora's own models are tied: what the head of another model is, only its own function knows.
    """
    for embedding, head in TIED_HEADS.items():
        if f"{embedding}/embedding" in leaves:
            return Tie(embedding, head, f"{head}/kernel" not in leaves and tree.is_own(leaves))
    return None


class Site(NamedTuple):
    """A weight that can be adapted, for all layers of its stack.

    Attributes:
        path: its module's path.
        leaf: the leaf that an update is added to, one of MAIN.
        shape: the shape of that leaf, [*stack, *inputs, *outputs] (experts: [*stack, E, inputs, outputs]).
        axes: how many of the shape's last axes are inputs, and how many outputs: (1, 1) for a matrix.
        names: the dotted names that patterns are matched with, one for each layer.
        stacked: whether the shape begins with an axis of layers.
        tied_to: the embedding whose weight it is, for a head without one of its own.
    """

    path: str
    leaf: str
    shape: tuple[int, ...]
    axes: tuple[int, int]
    names: tuple[str, ...]
    stacked: bool = False
    tied_to: str | None = None

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B without the rank, which is A's last axis and comes before the outputs in B."""
        outputs = self.axes[1]
        return self.shape[:-outputs], self.shape[-outputs:]

    @property
    def inputs(self) -> int:
        """How many values one weight reads."""
        before, _ = self.factor_shapes
        return math.prod(before[len(before) - self.axes[0] :])

    @property
    def outputs(self) -> int:
        """How many values one weight gives."""
        return math.prod(self.factor_shapes[1])

    @property
    def experts(self) -> int:
        """How many experts its kernel holds; 0 if it is not one of experts."""
        return self.shape[1] if self.stacked and is_expert(self.path) else 0

    @property
    def is_parameter(self) -> bool:
        """Whether PEFT sees this as a parameter, not a module, and takes its name only in `target_parameters`."""
        return self.leaf == "router" or self.experts > 0

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix of a linear that has a weight of its own."""
        return self.leaf == "kernel" and self.axes == (1, 1) and not self.tied_to and not self.is_parameter

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The shape of its settings: () or (layers,)."""
        return self.shape[:1] if self.stacked else ()


def sites(params: Params, input_axes: InputAxes = ()) -> list[Site]:
    """Every weight that can be adapted, in the tree's order, and at the end a head that is tied to its embedding.

    Args:
        input_axes: see `split_axes`.
    """
    found = []
    flat = {path: leaf for path, leaf in tree.flatten(params).items() if not tree.is_added(path)}
    stack_of = tree.stacks_of(flat)
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        if name in MAIN and module and leaf.ndim > 1:
            bias, stacked, shape = flat.get(f"{module}/bias"), stack_of(path) is not None, tuple(leaf.shape)
            axes = split_axes(module, shape, None if bias is None else bias.ndim, input_axes, stacked=stacked)
            names = module_names(module, shape[0], stack_of)
            names = [f"{item}.weight" for item in names] if name == "router" else names
            found.append(Site(module, name, shape, axes, tuple(names), stacked))
    pair = tie(flat)
    if pair and pair.tied:
        shape = tuple(flat[pair.weight].shape[::-1])
        found.append(Site(pair.head, "kernel", shape, (1, 1), (pair.head,), tied_to=pair.embedding))
    return found


def split_axes(
    module: str, shape: tuple[int, ...], bias_axes: int | None, input_axes: InputAxes = (), *, stacked: bool
) -> tuple[int, int]:
    """How many of a kernel's axes are inputs, and how many outputs.

    Flax's DenseGeneral and Conv can have several of each. The first matching pair of `input_axes` decides; without one
    the bias does, whose axes are the outputs; without a bias the last axis is the output.

    Args:
        bias_axes: how many axes the module's bias has, or None if it has no bias.
        input_axes: pairs (regular expression for the module's path, number of input axes).
        stacked: whether the shape, and the bias's with it, begins with an axis of layers (and one of experts).

    Raises:
        ValueError: the matching pair leaves the kernel no input or no output axis.
    """
    own = 2 if stacked and is_expert(module) else len(shape) - stacked
    for pattern, count in input_axes:
        if re.fullmatch(pattern, module):
            if not 0 < count < own:
                raise UserError(f"input_axes: {module} has {own} axes; {count} of them cannot be inputs")
            return count, own - count
    leading = len(shape) - own
    outputs = 1 if bias_axes is None else bias_axes - leading
    return own - outputs, outputs


def is_head(path: str) -> bool:
    """Whether this is the path of the head of one of jlora's models."""
    return path in TIED_HEADS.values()


def is_expert(path: str) -> bool:
    """Whether the leaf or module at `path` of a stack is a kernel of experts, which PEFT does not count as a linear."""
    return "/experts/" in path


def module_names(path: str, count: int, stack_of: Callable[[str], tree.Stack | None] = tree.stack_of) -> list[str]:
    """The dotted names of a module, one a layer.

    layers/self_attn/q_proj → layers.0.self_attn.q_proj, layers.1.…

    Args:
        count: the length of its leaves' leading axis, if the module is stacked.
        stack_of: path → stack or None, as from `tree.stacks_of`.
    """
    stack = stack_of(path)
    if stack is None:
        return [path.replace("/", ".")]
    name, rest = stack.name.replace("/", "."), stack.rest.replace("/", ".")
    return [f"{name}.{layer}.{rest}" for layer in stack.indices(count)]


def with_prefixes(name: str) -> list[str]:
    """The names that may mean a module of one of jlora's models.

    They are its own, and those that the Hub's classes give it.
    """
    return [prefix + name for prefix in HUB_PREFIXES]
