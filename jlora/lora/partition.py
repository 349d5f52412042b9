"""The trained and the frozen half of a param tree. Which half a leaf belongs to follows from its name.

Beside a module's own leaves an adapter may hold:
  lora_a, lora_b        the update's factors                         trained
  lora_bias             what the update adds besides (PEFT's `lora_bias`)
  lora_magnitude        DoRA's length of every output's weights
  lora_tokens           new rows for the tokens `lora_token_ids`
  trained_X             a copy of leaf X that takes its place        (`modules_to_save`, `bias`), or, where the base
                        has no such leaf, the leaf itself (`score/trained_kernel`)
  lora_scale, lora_rank, lora_dropout, lora_token_ids                settings, frozen
  lora_start_a, _b      the product that is subtracted from the base (PiSSA and its like)
  lora_base_norm        lengths of the frozen weights, for DoRA
  lora_tied             this embedding's adapter acts in the head too
  lora_carried          this embedding or head is not the base's: the adapter's file holds it whole (`jlora.hub.peft`)
  lora_ids, lora_weights   the adapters of a bank that every row of the batch uses (`jlora.lora.bank`)
"""

import jax.numpy as jnp

from jlora import tree
from jlora.errors import UserError
from jlora.types import Params

TRAINABLE = ("lora_a", "lora_b", "lora_bias", "lora_magnitude", "lora_tokens")
CARRIED = "lora_carried"
SETTINGS = (
    *("lora_scale", "lora_rank", "lora_dropout", "lora_token_ids", "lora_tied", CARRIED),
    *("lora_start_a", "lora_start_b", "lora_base_norm", "lora_ids", "lora_weights"),
)
TRAINED = "trained_"
# LoRA+ gives B's learning rate also to everything that has one axis (PEFT's `create_loraplus_optimizer`).
LIKE_B = ("lora_b", "lora_bias", "lora_magnitude", "trained_bias", "trained_scale")


def is_trainable(path: str) -> bool:
    """Whether the leaf at `path` is trained."""
    name = path.rpartition("/")[2]
    return name in TRAINABLE or name.startswith(TRAINED)


def is_adapter(path: str) -> bool:
    """Whether the leaf at `path` belongs to an adapter, as a trained weight or a setting."""
    return is_trainable(path) or path.rpartition("/")[2] in SETTINGS


def labels(params: Params) -> Params:
    """The tree with a label for each leaf, for `optax.partition`: "frozen", or, for trainable leaves, "lora_a" or
    "lora_b", whose learning rates may differ.
    """

    def label(path: str, _: object) -> str:
        if not is_trainable(path):
            return "frozen"
        return "lora_b" if path.rpartition("/")[2] in LIKE_B else "lora_a"

    return tree.map_with_path(label, params)


def split(params: Params) -> tuple[Params, Params]:
    """(frozen, trainable): two trees that share no leaf, such that combine(*split(params)) == params.

    {"q_proj": {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": s}}
      →  {"q_proj": {"kernel": w, "lora_scale": s}},  {"q_proj": {"lora_a": a, "lora_b": b}}
    """
    flat = tree.flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if is_trainable(path)}
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
    flat = tree.flatten(params)
    others = (*("lora_magnitude", "lora_tokens"), TRAINED)
    if kept := sorted(path for path in flat if path.rpartition("/")[2].startswith(others)):
        raise UserError("only updates that are added to the base have a scale; found\n  " + "\n  ".join(kept))
    return tree.map_with_path(lambda path, leaf: leaf * factor if path.endswith("/lora_scale") else leaf, params)


def resolve(module: Params) -> Params:
    """A module's leaves as they are used: trained copies replace the leaves that they were copied from."""
    copies = {name.removeprefix(TRAINED): leaf for name, leaf in module.items() if name.startswith(TRAINED)}
    return {name: leaf for name, leaf in module.items() if not name.startswith(TRAINED)} | copies


def with_starts(params: Params) -> Params:
    """The tree with every `lora_start_a`, `lora_start_b` made part of A and B, whose rank doubles."""

    def widen(path: str, module: Params) -> Params:
        if "lora_start_a" not in module:
            return module
        kept = {name: leaf for name, leaf in module.items() if not name.startswith("lora_start_")}
        lora_a = jnp.concatenate([module["lora_a"], module["lora_start_a"]], axis=-1)
        lora_b = jnp.concatenate([module["lora_b"], -module["lora_start_b"]], axis=-2)
        if "lora_rank" in module:  # the ranks that a layer uses must come first
            rank, width = module["lora_rank"][..., None], module["lora_a"].shape[-1]
            used = jnp.arange(2 * width).reshape((1,) * (rank.ndim - 1) + (-1,)) % width < rank
            order = jnp.argsort(~used, axis=-1, stable=True)
            lora_a = jnp.take_along_axis(lora_a, order[..., None, :], axis=-1)
            lora_b = jnp.take_along_axis(lora_b, order[..., :, None], axis=-2)
            kept["lora_rank"] = 2 * module["lora_rank"]
        return kept | {"lora_a": lora_a, "lora_b": lora_b}

    return tree.map_modules(widen, params)
