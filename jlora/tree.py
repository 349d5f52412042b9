"""Param trees: nested dicts whose leaves are named by '/'-joined paths, and ordered full-match rules over those
paths.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax

Value = TypeVar("Value")


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A flat dict from path to leaf, sorted by path. Whatever is not a dict is a leaf, quantised values included.

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
    """The nested dict whose `flatten` is `flat` (empty dicts do not come back: they hold nothing)."""
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
        ValueError: a path that no rule covers, or (unless `allow_unused`) a rule that matched no path; all are listed.
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
        raise ValueError("rules do not fit the tree:\n  " + "\n  ".join(problems))
    return matched


def count(tree: Any) -> int:
    """The number of parameters: logical sizes, so a packed 4-bit array counts its weights and not its bytes."""
    leaves = flatten(tree).values() if isinstance(tree, dict) else [tree]
    return sum(leaf.size for leaf in leaves)


def nbytes(tree: Any) -> int:
    """The bytes that the tree's arrays hold, packed arrays as packed."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
