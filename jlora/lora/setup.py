"""New adapters for a param tree, initialised as in PEFT."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.errors import UserError
from jlora.lora import starts
from jlora.lora.config import LoraConfig
from jlora.lora.kinds import KINDS, TIED, changes_one_end, check
from jlora.lora.kinds.kind import Start
from jlora.lora.partition import is_adapter
from jlora.lora.sites import InputAxes, tie
from jlora.lora.targets import find_targets
from jlora.types import Params


def init(
    params: Params,
    config: LoraConfig,
    key: jax.Array,
    *,
    dense: Params | None = None,
    gradients: Params | None = None,
    moments: Params | None = None,
    input_axes: InputAxes = (),
) -> Params:
    """The params with new adapters beside the targeted leaves.

    With the default initialisation the model's outputs do not change.

    q_proj/kernel [L, D, N]  →  q_proj/kernel [L, D, N]          untouched, packed or not
                                q_proj/lora_a [L, D, R] float32  trainable
                                q_proj/lora_b [L, R, N] float32  trainable
                                q_proj/lora_scale [L]   float32  alpha / r; 0 switches the adapter off
                                q_proj/lora_rank [L]    int32    only where layers differ: the rest is zero
                                q_proj/lora_dropout [L] float32  only with dropout: the probability

    `jlora.lora.kinds` lists the other leaves that the config may add. A module's random key depends only on `key` and
    its path, so adding a target never changes how another one starts.

    Args:
        dense: the same base before it was packed, for init_lora_weights="loftq".
        gradients: the kernels' gradients (`kernel_gradients`), for init_lora_weights="lora_ga".
        moments: the moments of the linears' inputs (`Model.input_moments`), for init_lora_weights="eva".
        input_axes: pairs (regular expression for a module's path, how many of its kernel's axes are inputs), for
            kernels with more than two axes and no bias to tell them apart (Flax's DenseGeneral).

    Raises:
        ValueError: the tree already has adapters, a pattern of the config matches nothing, or settings conflict.
    """
    flat = tree.flatten(params)
    if present := [path for path in flat if is_adapter(path)]:
        raise UserError(f"the params already hold adapters ({present[0]}, …): merge or strip them first")
    check(config)
    targets = find_targets(params, config, input_axes)
    directions: dict[str, jax.Array] = {}
    if config.init_lora_weights == "eva":
        targets, directions = starts.spread_over_data(targets, config, moments)
    seen = {"dense": tree.flatten(dense or {}), "gradients": tree.flatten(gradients or {})}
    for kind in KINDS:
        if kind.wanted(config):
            flat |= kind.start(Start(flat, config, targets, key, directions=directions, **seen))
    return tree.unflatten(flat | ties(flat))


def ties(flat: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A `lora_tied` leaf for an adapted embedding that is also its model's head and acts in both places."""
    pair = tie(flat)
    if pair is None or not pair.tied or any(path.startswith(f"{pair.head}/") for path in flat):
        return {}
    return {f"{pair.embedding}/{TIED.name}": jnp.int32(1)} if changes_one_end(flat, pair.embedding) else {}
