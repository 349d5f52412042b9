"""Which modules a LoraConfig adapts, with what rank and scale, by PEFT's matching rules for the Hub's dotted names."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jlora import tree
from jlora.errors import UserError
from jlora.families import each
from jlora.families.family import SCORE
from jlora.lora.config import LoraConfig
from jlora.lora.merging import MAIN, tied_heads

# The modules that "all-linear" leaves alone: those that compute logits or a reward model's score.
HEADS = (*each(lambda family: family.names.head), SCORE)
# Prefixes that Hugging Face's causal-LM classes put before a module's own name; patterns match with or without them.
HUB_PREFIXES = ("", *each(lambda family: family.prefix))


InputAxes = Sequence[tuple[str, int]]


class Candidate(NamedTuple):
    """A module that can be adapted.

    Attributes:
        path: the module's path.
        leaf: the leaf that its update is added to: "kernel", "embedding" or "router".
        shape: the shape of that leaf, [*stack, *inputs, *outputs] (experts: [*stack, E, inputs, outputs]).
        axes: how many of the shape's last axes are inputs, and how many outputs: (1, 1) for a matrix.
        names: the dotted names that patterns are matched with, one for each layer.
        stacked: whether the shape begins with an axis of layers.
    """

    path: str
    leaf: str
    shape: tuple[int, ...]
    axes: tuple[int, int]
    names: list[str]
    stacked: bool = False

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B without the rank, which is A's last axis and comes before the outputs in B."""
        outputs = self.axes[1]
        return self.shape[:-outputs], self.shape[-outputs:]

    @property
    def is_parameter(self) -> bool:
        """Whether PEFT sees this as a parameter, not a module, and takes its name only in `target_parameters`."""
        return self.leaf == "router" or (self.stacked and is_expert(self.path))

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The shape of its settings: () or (layers,)."""
        return self.shape[:1] if self.stacked else ()


@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted module, with a rank (0: left alone) and a scale for each layer of its stack, or one of each."""

    candidate: Candidate
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def path(self) -> str:
        return self.candidate.path


def find_targets(params: dict, config: LoraConfig, input_axes: InputAxes = ()) -> list[Target]:
    """The modules of `params` that `config` adapts.

    Args:
        input_axes: see `split_axes`.

    Raises:
        ValueError: a target, an exclusion or a pattern matches nothing (all such are listed, with the names there are),
            or several weights of one module are selected.
    """
    found = candidates(params, input_axes)
    _require_matches(config, found)
    targets = []
    for candidate in found:
        settings = [_settings(name, candidate, config) for name in candidate.names]
        if any(rank for rank, _ in settings):
            ranks, scales = zip(*settings, strict=True)
            targets.append(Target(candidate, ranks, scales))
    paths = [target.path for target in targets]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise UserError(
            "an adapter lies beside one weight of a module, and these modules hold several (kernel, embedding, "
            f"router): exclude_modules can leave them out: {', '.join(twice)}"
        )
    if not targets:
        linears = sorted(candidate.path for candidate in found if candidate.leaf == "kernel")
        raise UserError(f"target_modules={config.target_modules!r} selects no linear; there are {', '.join(linears)}")
    return targets


def candidates(params: dict, input_axes: InputAxes = ()) -> list[Candidate]:
    """Every module that can be adapted, in the tree's order, including a head that is tied to its embedding."""
    found = []
    flat = tree.flatten(params)
    stack_of = tree.stacks_of(flat)
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        if name in MAIN and module and leaf.ndim > 1:
            bias, stacked, shape = flat.get(f"{module}/bias"), stack_of(path) is not None, tuple(leaf.shape)
            axes = split_axes(module, shape, None if bias is None else bias.ndim, input_axes, stacked=stacked)
            names = module_names(module, shape[0], stack_of)
            names = [f"{item}.weight" for item in names] if name == "router" else names
            found.append(Candidate(module, name, shape, axes, names, stacked))
    for embedding, head in tied_heads(flat).items():
        shape = tuple(flat[f"{embedding}/embedding"].shape[::-1])
        found.append(Candidate(head, "kernel", shape, (1, 1), [head]))
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
        stacked: whether the shape, and the bias's with it, begins with an axis of layers.

    Raises:
        ValueError: the matching pair leaves the kernel no input or no output axis.
    """
    own = 2 if stacked and is_expert(module) else len(shape) - stacked
    for pattern, count in input_axes:
        if re.fullmatch(pattern, module):
            if not 0 < count < own:
                raise UserError(f"input_axes: {module} has {own} axes; {count} of them cannot be inputs")
            return count, own - count
    outputs = 1 if bias_axes is None else bias_axes - stacked
    return own - outputs, outputs


def is_expert(path: str) -> bool:
    """Whether the leaf or module at `path` of a stack is a kernel of experts, which PEFT does not count as a linear."""
    return "/experts/" in path


def module_names(path: str, count: int, stack_of: Callable[[str], tree.Stack | None] = tree.stack_of) -> list[str]:
    """The dotted names of a module, one a layer: layers/self_attn/q_proj → layers.0.self_attn.q_proj, layers.1.…

    Args:
        count: the length of its leaves' leading axis, if the module is stacked.
        stack_of: path → stack or None, as from `tree.stacks_of`.
    """
    stack = stack_of(path)
    if stack is None:
        return [path.replace("/", ".")]
    name, rest = stack.name.replace("/", "."), stack.rest.replace("/", ".")
    return [f"{name}.{layer}.{rest}" for layer in stack.indices(count)]


def matches(name: str, pattern: str | tuple[str, ...]) -> bool:
    """PEFT's rule for target_modules and exclude_modules: the items of a tuple match dotted suffixes; a string is a
    regular expression for the full name.
    """
    if isinstance(pattern, str):
        return any(re.fullmatch(pattern, prefix + name) for prefix in HUB_PREFIXES)
    return any(full == item or full.endswith("." + item) for item in pattern for full in _with_prefixes(name))


def _with_prefixes(name: str) -> list[str]:
    return [prefix + name for prefix in HUB_PREFIXES]


def _matches_suffix(name: str, key: str) -> bool:
    """PEFT's rule for the keys of rank_pattern and alpha_pattern."""
    return any(re.match(rf"(.*\.)?({key})$", full) for full in _with_prefixes(name))


def saves(name: str, config: LoraConfig) -> bool:
    """Whether `modules_to_save` selects the module: as in PEFT, only the end of its name counts."""
    return any(name.endswith(item) for item in config.modules_to_save or ())


def _settings(name: str, candidate: Candidate, config: LoraConfig) -> tuple[int, float]:
    """(rank, scale) of one module; rank 0 if it is not adapted."""
    if not _is_wanted(name, candidate, config):
        return 0, 0.0
    rank = next((value for key, value in config.rank_pattern if _matches_suffix(name, key)), config.r)
    alpha = next((value for key, value in config.alpha_pattern if _matches_suffix(name, key)), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _is_wanted(name: str, candidate: Candidate, config: LoraConfig) -> bool:
    if candidate.is_parameter:
        return bool(config.target_parameters) and matches(name, config.target_parameters)
    if (config.exclude_modules is not None and matches(name, config.exclude_modules)) or saves(name, config):
        return False
    if config.target_modules == "all-linear":
        return candidate.leaf == "kernel" and candidate.path.split("/")[-1] not in HEADS
    if config.layers_to_transform is not None:
        layer = re.search(r"\.(\d+)\.", name)
        if layer is None or int(layer[1]) not in config.layers_to_transform:
            return False
    return matches(name, config.target_modules)


def _require_matches(config: LoraConfig, found: list[Candidate]) -> None:
    modules = [name for candidate in found if not candidate.is_parameter for name in candidate.names]
    parameters = [name for candidate in found if candidate.is_parameter for name in candidate.names]
    problems = []
    for field, names in (("target_modules", modules), ("exclude_modules", modules), ("target_parameters", parameters)):
        pattern = getattr(config, field)
        if pattern is None or pattern == "all-linear":
            continue
        items = [pattern] if isinstance(pattern, str) else [(item,) for item in pattern]
        problems += [f"{field} {item!r}" for item in items if not any(matches(name, item) for name in names)]
    for field in ("rank_pattern", "alpha_pattern"):
        keys = [key for key, _ in getattr(config, field)]
        everything = modules + parameters
        problems += [f"{field} {key!r}" for key in keys if not any(_matches_suffix(name, key) for name in everything)]
    layers = {int(layer[1]) for name in modules if (layer := re.search(r"\.(\d+)\.", name))}
    problems += [f"layers_to_transform {layer}" for layer in config.layers_to_transform or () if layer not in layers]
    if problems:
        last = sorted({name.rpartition(".")[2] for name in modules} | {".".join(n.split(".")[-2:]) for n in parameters})
        raise UserError(
            "these match no linear of the model:\n  "
            + "\n  ".join(problems)
            + f"\nthe model's linears end in: {', '.join(last)}"
        )
