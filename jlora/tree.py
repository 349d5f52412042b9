"""Param trees: nested dicts whose leaves are named by '/'-joined paths, and ordered full-match rules on those paths."""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jlora.errors import UserError
from jlora.families import each, every
from jlora.families.family import SCORE

Value = TypeVar("Value")

# A stack of decoder layers: every leaf below it has a leading axis of layers. A stack of only some of the layers names
# them: "layers@0-2" is the first three, "layers@1-23:2" every second one from 1 to 23. A number below the stack's name
# means separate layers (the lists of other Flax models).
STACK = re.compile(
    rf"(?P<stack>{'|'.join(each(lambda family: family.names.stack))})"
    r"(?:@(?P<first>\d+)-(?P<last>\d+)(?::(?P<step>\d+))?)?/(?P<rest>(?!\d+(?:/|$)).+)"
)
# What jlora's own models hold outside their stacks.
OUTSIDE = re.compile(rf"({'|'.join((SCORE, *every(lambda family: family.names.outside)))})/[^/]+")
# The least number of axes of a stacked leaf with this name. In a single module it has one less.
STACKED_AXES = {
    "kernel": 3,
    "embedding": 3,
    "router": 3,
    "scale": 2,
    "bias": 2,
    "sinks": 2,
    "e_score_correction_bias": 2,
}
# The most layers of a pattern that repeats (`stack_ranges`).
PERIOD = 12
# How the names of all leaves of adapters begin (`jlora.lora.kinds`).
ADDED = ("lora_", "trained_")


class Stack(NamedTuple):
    """A path below a stack, taken apart.

    Attributes:
        name: the stack's own path, without the layers that it holds: "layers".
        layers: which layers it holds; None for all of the model's.
        rest: the path inside a layer.
    """

    name: str
    layers: range | None
    rest: str

    def indices(self, count: int) -> range:
        """The layers of a leaf with `count` entries."""
        return range(count) if self.layers is None else self.layers


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A flat dict from path to leaf, sorted by path. Everything that is not a dict is a leaf, even quantised values.

    {"layers": {"q_proj": {"kernel": w}}, "norm": {"scale": s}}  →  {"layers/q_proj/kernel": w, "norm/scale": s}
    """
    flat: dict[str, Any] = {}
    for name in sorted(tree):
        value = tree[name]
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict:
    """The nested dict whose `flatten` is `flat`. Empty dicts have no leaves, so they are not restored."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: dict) -> dict:
    """The tree with every leaf replaced by `function(path, leaf)`."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def map_modules(function: Callable[[str, dict], dict], tree: dict, path: str = "") -> dict:
    """The tree with every module that holds leaves replaced by `function(path, module)`, innermost first."""
    node = {
        name: map_modules(function, value, f"{path}/{name}".lstrip("/")) if isinstance(value, dict) else value
        for name, value in tree.items()
    }
    holds_leaves = any(not isinstance(value, dict) for value in node.values())
    return function(path, node) if holds_leaves else node


def match_rules(
    rules: Sequence[tuple[str, Value]], paths: Iterable[str], *, allow_unused: bool = False
) -> dict[str, Value]:
    """Path → value of the first rule whose regular expression matches the full path.

    Raises:
        ValueError: no rule covers a path, or (unless `allow_unused`) a rule matches no path; all cases are listed.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    matched: dict[str, Value] = {}
    problems: list[str] = []
    used: set[int] = set()
    for path in paths:
        hits = [i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(path)]
        used.update(hits)
        if hits:
            matched[path] = compiled[hits[0]][1]
        else:
            problems.append(f"no rule covers {path!r}")
    if not allow_unused:
        problems += [f"rule {rules[i][0]!r} matches nothing" for i in range(len(rules)) if i not in used]
    if problems:
        raise UserError("rules do not fit the tree:\n  " + "\n  ".join(problems))
    return matched


def count(tree: Any) -> int:
    """The number of parameters. Sizes are logical: a packed 4-bit array counts its weights, not its bytes."""
    leaves = flatten(tree).values() if isinstance(tree, dict) else [tree]
    return sum(leaf.size for leaf in leaves)


def nbytes(tree: Any) -> int:
    """The number of bytes of the tree's arrays; packed arrays count as packed."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract(values: Any, shardings: Any) -> Any:
    """The shapes and dtypes of the arrays, with shardings from a tree of the same structure."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), values, shardings
    )


def digest(leaf: Any) -> list[jax.Array]:
    """For each array of a leaf, the sum modulo 2³² of its scrambled words times odd weights that depend on position.

    The sum is exact in any order. A change of one word always changes it; several changes cancel only by chance.
    """

    def one(array: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
        total = _scramble(words)
        for axis in range(array.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            total = total * (index * jnp.uint32(1013904226) + jnp.uint32(2 * axis + 1))
        return jnp.sum(total, dtype=jnp.uint32)

    return [one(array) for array in jax.tree.leaves(leaf)]


def _scramble(words: jax.Array) -> jax.Array:
    """A permutation of the 32-bit words in which each input bit affects many output bits."""
    for _ in range(2):
        words = (words ^ (words >> jnp.uint32(15))) * jnp.uint32(2654435761)
    return words ^ (words >> jnp.uint32(16))


def stack_of(path: str) -> Stack | None:
    """The stack of the leaf or module at `path` of a jlora model; None if it is not stacked.

    The path is enough for jlora's own models only: others may call anything `layers` or `h` (see `stacks_of`).
    """
    match = STACK.fullmatch(path)
    if match is None:
        return None
    layers = None
    if match["first"] is not None:
        layers = range(int(match["first"]), int(match["last"]) + 1, int(match["step"] or 1))
    return Stack(match["stack"], layers, match["rest"])


def stacks_of(leaves: Mapping[str, Any]) -> Callable[[str], Stack | None]:
    """`stack_of` for the paths of any model's tree, where a stack is recognised by its structure.

    What has a stack's name is one only if all leaves below it have the same first axis, and one axis more than in a
    single module.

    {"h/dense/kernel": [4, 24, 24], "h/dense/bias": [4, 24]}  →  a stack of 4 layers
    {"h/dense/kernel": [24, 24],    "h/dense/bias": [24]}     →  a module that is called h

    Args:
        leaves: path → leaf of the whole tree; leaves of adapters are ignored.

    Returns:
        A function from path to `Stack`, or None for a path that is not below a stack.
    """
    counts: dict[str, set[int | None]] = {}
    names: dict[str, str] = {}
    for path, leaf in leaves.items():
        last = path.rpartition("/")[2]
        stack = stack_of(path)
        if stack is None or is_added(last) or not hasattr(leaf, "shape"):
            continue
        key = path[: len(path) - len(stack.rest)]
        shape = tuple(leaf.shape)
        whole = "/" in stack.rest and len(shape) >= STACKED_AXES.get(last, 1)
        counts.setdefault(key, set()).add(shape[0] if whole else None)
        names[key] = stack.name
    single = {names[key] for key, found in counts.items() if None in found or len(found) > 1}

    def find(path: str) -> Stack | None:
        stack = stack_of(path)
        return None if stack is None or stack.name in single else stack

    return find


def is_added(path: str) -> bool:
    """Whether the leaf at `path` was added by an adapter, as all their leaves' names say."""
    return path.rpartition("/")[2].startswith(ADDED)


def is_own(leaves: Mapping[str, Any]) -> bool:
    """Whether these are the leaves of one of jlora's own models, or of a part of one."""
    find = stacks_of(leaves)
    return all(OUTSIDE.fullmatch(path) or find(path) for path in leaves)


def stack_key(name: str, layers: range, total: int) -> str:
    """The path of the stack that holds `layers` out of `total` layers: the inverse of `stack_of`."""
    if layers == range(total):
        return name
    step = f":{layers.step}" if layers.step > 1 else ""
    return f"{name}@{layers[0]}-{layers[-1]}{step}"


def stack_ranges(signatures: Sequence[Hashable]) -> list[range]:
    """The layers of each stack, if only layers with equal signatures can share one.

    The layers are cut into pieces that repeat a pattern of up to PERIOD layers, so that there are as few stacks (one
    for every place in a pattern), and then as few pieces, as possible.

    a a a  →  0-2        a b a b a b  →  0-4:2, 1-5:2        a b b b  →  0-0, 1-3
    """
    total = len(signatures)
    # For each first layer: (stacks and pieces from here to the end, -layers that the first piece covers, its period).
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * (total + 1)
    equal = [0] * (PERIOD + 1)  # for each period, how many layers from here on equal the one that many further on
    for first in reversed(range(total)):
        options = []
        for period in range(1, min(PERIOD, total - first) + 1):
            alike = first + period < total and signatures[first] == signatures[first + period]
            equal[period] = equal[period] + 1 if alike else 0
            times = equal[period] // period + 1
            if period == 1 or times > 1:
                stacks, pieces, *_ = best[first + period * times]
                options.append((period + stacks, 1 + pieces, -period * times, period))
        best[first] = min(options)
    found, first = [], 0
    while first < total:
        *_, covered, period = best[first]
        found += [range(first + place, first - covered, period) for place in range(period)]
        first -= covered
    return found


def subtree(tree: dict, path: str) -> dict:
    """The part of the tree at `path`."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def stacks(tree: dict, name: str) -> dict[str, dict]:
    """Path → leaves of every stack of layers called `name`, whichever layers it holds."""
    parent, _, last = name.rpartition("/")
    node = subtree(tree, parent) if parent else tree
    prefix = f"{parent}/" if parent else ""
    return {prefix + key: leaves for key, leaves in node.items() if key.partition("@")[0] == last}
