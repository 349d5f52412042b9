"""The trained and the frozen half of a param tree.

Which half a leaf belongs to follows from its name, by the table of `jlora.lora.kinds`; in full fine-tuning, from its
path, by the patterns of `jlora.lora.full`.
"""

from collections.abc import Callable

from jlora import tree
from jlora.errors import UserError
from jlora.lora.kinds import KINDS, leaf_of, not_held
from jlora.lora.kinds.kind import DROPOUT, SCALE
from jlora.types import Params


def is_trainable(path: str) -> bool:
    """Whether the leaf at `path` is trained."""
    leaf = leaf_of(path.rpartition("/")[2])
    return leaf is not None and leaf.trained


def is_adapter(path: str) -> bool:
    """Whether the leaf at `path` belongs to an adapter, as a trained weight or a setting."""
    return leaf_of(path.rpartition("/")[2]) is not None


def labels(params: Params, trained: Callable[[str], bool] = is_trainable) -> Params:
    """The tree with a label for each leaf, for `optax.partition`.

    It is "frozen", or, for trainable leaves, "lora_a" or "lora_b", whose learning rates may differ. Leaves of the base
    that are trained learn like A.

    Args:
        trained: (path) → whether the leaf is trained.
    """

    def label(path: str, _: object) -> str:
        leaf = leaf_of(path.rpartition("/")[2])
        if not trained(path):
            return "frozen"
        return "lora_b" if leaf is not None and leaf.like_b else "lora_a"

    return tree.map_with_path(label, params)


def split(params: Params, trained: Callable[[str], bool] = is_trainable) -> tuple[Params, Params]:
    """(frozen, trainable): two trees that share no leaf, such that combine(*split(params)) == params.

    {"q_proj": {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": s}}
      →  {"q_proj": {"kernel": w, "lora_scale": s}},  {"q_proj": {"lora_a": a, "lora_b": b}}

    Args:
        trained: (path) → whether the leaf is trained: an adapter's weight, or what `FullConfig.trains` chooses.
    """
    flat = tree.flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if trained(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return tree.unflatten(frozen), tree.unflatten(trainable)


def combine(frozen: Params, trainable: Params) -> Params:
    """The tree with the leaves of both halves: the inverse of `split`.

    Raises:
        ValueError: both halves hold the same leaves; all are listed.
    """
    left, right = tree.flatten(frozen), tree.flatten(trainable)
    if both := sorted(left.keys() & right.keys()):
        raise UserError("both halves hold these leaves:\n  " + "\n  ".join(both))
    return tree.unflatten(left | right)


def strip(params: Params) -> Params:
    """The base tree: `params` without any adapter."""
    return tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if not is_adapter(path)})


def adapter_leaves(params: Params) -> Params:
    """The adapter alone, both trained weights and settings: what `strip` removes.

    {"q_proj": {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": s}, "score": {"trained_kernel": k}}
      →  {"q_proj": {"lora_a": a, "lora_b": b, "lora_scale": s}, "score": {"trained_kernel": k}}
    """
    return tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if is_adapter(path)})


def overlay(params: Params, adapter: Params) -> Params:
    """The base of `params` with this adapter, which replaces any that they had; {} gives the base alone.

    overlay(params, adapter_leaves(params)) == params, and adapter_leaves(overlay(params, adapter)) == adapter.

    Raises:
        ValueError: `adapter` holds leaves of the base; all are listed.
    """
    return combine(strip(params), adapter)


def scaled(params: Params, factor: int | float) -> Params:
    """The params with every update multiplied by a factor: 0 gives the base's outputs, 1 the adapter as it is.

    Raises:
        ValueError: the adapter has leaves that are not added to the base (DoRA's magnitudes, trained copies, token
            rows); all are listed.
    """
    if kept := not_held(tree.flatten(params), [kind for kind in KINDS if kind.additive]):
        raise UserError("only updates that are added to the base have a scale; found\n  " + "\n  ".join(sorted(kept)))
    return tree.map_with_path(lambda path, leaf: leaf * factor if path.endswith(f"/{SCALE.name}") else leaf, params)


def drops(params: Params) -> bool:
    """Whether the adapters in a tree, or in its frozen half, drop inputs in training."""
    return any(path.endswith(f"/{DROPOUT.name}") for path in tree.flatten(params))


def with_starts(params: Params) -> Params:
    """The tree with every update written as one plain product lora_a @ lora_b, where that is possible.

    What training started from becomes a part of A and B, whose rank doubles.
    """

    def widen(path: str, module: Params) -> Params:
        for kind in KINDS:
            module = kind.as_product(module)
        return module

    return tree.map_modules(widen, params)
