"""Two halves of a param tree: what is trained and what is frozen. All of it follows from the leaf's name."""

from jlora import tree
from jlora.types import Params

TRAINABLE = ("lora_a", "lora_b")
SETTINGS = ("lora_scale", "lora_rank", "lora_dropout")


def is_adapter(path: str) -> bool:
    """Whether the leaf at `path` belongs to an adapter: trained weights and their settings."""
    return path.rpartition("/")[2] in (*TRAINABLE, *SETTINGS)


def labels(params: Params) -> Params:
    """The tree with "lora_a" or "lora_b" at every trainable leaf and "frozen" at every other, for `optax.partition`."""

    def label(path: str, _: object) -> str:
        name = path.rpartition("/")[2]
        return name if name in TRAINABLE else "frozen"

    return tree.map_with_path(label, params)


def split(params: Params) -> tuple[Params, Params]:
    """(frozen, trainable): two trees that share no leaf. The law: combine(*split(params)) == params.

    {"q_proj": {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": s}}
      →  {"q_proj": {"kernel": w, "lora_scale": s}},  {"q_proj": {"lora_a": a, "lora_b": b}}
    """
    flat = tree.flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if path.rpartition("/")[2] in TRAINABLE}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return tree.unflatten(frozen), tree.unflatten(trainable)


def combine(frozen: Params, trainable: Params) -> Params:
    """The tree that `split` took apart.

    Raises:
        ValueError: a leaf that both halves hold; all are listed.
    """
    left, right = tree.flatten(frozen), tree.flatten(trainable)
    if both := sorted(left.keys() & right.keys()):
        raise ValueError("both halves hold these leaves:\n  " + "\n  ".join(both))
    return tree.unflatten(left | right)


def strip(params: Params) -> Params:
    """The base tree: `params` without adapters."""
    return tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if not is_adapter(path)})
