"""Merging adapters into their base leaves."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora import quant, tree
from jlora.errors import UserError
from jlora.families import each
from jlora.lora.partition import TRAINED, is_adapter
from jlora.types import Params

Kernel = jax.Array | quant.PackedArray
# The leaf that an update is added to.
MAIN = ("kernel", "embedding", "router")
# Embedding → the head that shares its weight if the tree has no head of its own.
TIED_HEADS = dict(each(lambda family: (family.names.embedding, family.names.head)))


def merge(params: Params, dtype: jax.typing.DTypeLike | None = None) -> Params:
    """The base tree with every adapter merged in: kernel + scale · lora_a @ lora_b, in float32, rounded once.

    A packed kernel comes back dense, in the dtype it dequantises to: packing the sum again would erase small updates.
    A kernel that was trained to be packed with its update (`jlora.quant.Rounded`) comes back packed. If the adapter
    changes an embedding and its tied head differently, the merged tree has a head of its own. Leaves that only the
    adapter has become the base's: score/trained_kernel → score/kernel. A tree without adapters comes back unchanged.
    One layer's sum at a time is held in float32.

    Args:
        dtype: what to round leaves to that do not stay packed; None: each to its own dtype.
    """
    merged = tree.map_modules(functools.partial(_merge_module, dtype=dtype), untie(params))
    return tree.map_with_path(lambda _, leaf: quant.stored(leaf, dtype), merged)


def untie(params: Params) -> Params:
    """The tree with a head of its own if its adapter changes an embedding and the tied head differently; otherwise the
    tree itself.
    """
    flat = tree.flatten(params)
    for path, head in tied_heads(flat).items():
        changed = any(f"{path}/{name}" in flat for name in ("lora_a", f"{TRAINED}embedding"))
        own = [name for name in flat if name.startswith(f"{head}/")]
        if own or (changed and f"{path}/lora_tied" not in flat):
            weight = flat[f"{path}/embedding"].T
            extra = {f"{head}/kernel": weight}
            if f"{path}/lora_tokens" in flat and f"{head}/{TRAINED}kernel" not in flat:
                # Not as the head's token rows: those would replace its own update, which must be added to them.
                extra[f"{head}/{TRAINED}kernel"] = _with_tokens(
                    weight.astype(jnp.float32), tree.subtree(params, path), rows=False
                )
            return tree.unflatten(flat | extra)
    return params


def tied_heads(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Embedding → head for the embeddings that are also their model's head, in jlora's own models. What the head of
    another model is, only its own function knows.
    """
    tied = {
        embedding: head
        for embedding, head in TIED_HEADS.items()
        if f"{embedding}/embedding" in leaves and f"{head}/kernel" not in leaves
    }
    return tied if tied and tree.is_own(leaves) else {}


def merged_leaf(module: Params, name: str, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """One leaf of a module, stacked or not, with the module's adapter merged in.

    Args:
        name: the leaf's name in the module.
        dtype: what to round the float32 sum to; None: the leaf's own dtype.

    Raises:
        ValueError: the leaf is a bias that only the adapter has.
    """
    if name == "bias" and "bias" not in module:
        raise UserError("the adapter adds a bias (lora_bias) where the model has none: it cannot be merged")
    base = module[name]
    base = quant.unpacked(base)
    value = module.get(f"{TRAINED}{name}", base)
    if name in MAIN:
        value = _with_update(value, module)
        value = _with_tokens(value, module, rows=name == "embedding")
    if name == "bias" and "lora_bias" in module:
        value = value.astype(jnp.float32) + module["lora_bias"] * module["lora_scale"][..., None]
    return value.astype(dtype or base.dtype)


def changed_leaves(module: Params) -> set[str]:
    """The names of the leaves that a module's adapter changes, including leaves that only the adapter has."""
    changed = {name.removeprefix(TRAINED) for name in module if name.startswith(TRAINED)}
    if "lora_a" in module or "lora_tokens" in module:
        changed |= {name for name in MAIN if name in module}
    return changed | ({"bias"} if "lora_bias" in module else set())


def with_bias(module: Params) -> Params:
    """The module, with a bias of zeros if only its adapter has one."""
    if "lora_bias" not in module or "bias" in module:
        return module
    return module | {"bias": jnp.zeros(module["lora_bias"].shape, module["kernel"].dtype)}


def column_norms(module: Params) -> Float[Array, "*stack N"]:
    """‖kernel + scale · lora_a @ lora_b‖ of every output, float32, without forming the sum.

    By ‖W + s·AB‖² = ‖W‖² + 2s⟨W, AB⟩ + s²‖AB‖², whose first term is frozen: O(D·N·R).
    """
    lora_a, lora_b = module["lora_a"], module["lora_b"]
    scale = module["lora_scale"]
    scale = scale.reshape(scale.shape + (1,) * (lora_b.ndim - scale.ndim)) * jnp.ones_like(lora_b[..., :1, :1])
    if "lora_start_a" in module:
        lora_a = jnp.concatenate([lora_a, module["lora_start_a"]], axis=-1)
        lora_b = jnp.concatenate([lora_b, -module["lora_start_b"]], axis=-2)
    kernel = quant.unpacked(module["kernel"])
    crossed = jnp.swapaxes(lora_a, -1, -2) @ kernel.astype(jnp.float32)
    gram = jnp.swapaxes(lora_a, -1, -2) @ lora_a
    squares = 2 * scale * crossed * lora_b + scale**2 * (gram @ lora_b) * lora_b
    return jnp.sqrt(jnp.maximum(module["lora_base_norm"] ** 2 + jnp.sum(squares, axis=-2), 0))


def base_norms(kernel: Kernel) -> Float[Array, "*stack N"]:
    """‖kernel‖ of every output, float32."""
    return jnp.sqrt(jnp.sum(quant.unpacked(kernel).astype(jnp.float32) ** 2, axis=-2))


def gains(module: Params) -> Float[Array, "*stack N"]:
    """DoRA's factor for every output: its magnitude over its current length, which no gradient flows through."""
    factor = module["lora_magnitude"] / jax.lax.stop_gradient(column_norms(module))
    if "lora_rank" in module:  # layers of a stack that are not adapted
        factor = jnp.where(module["lora_rank"][..., None] > 0, factor, 1)
    return factor


def layer_of(leaves: Any, number: int) -> Any:
    """One layer's part of a stack's leaves."""
    return jax.tree.map(lambda part: part[number], leaves)


def _merge_module(path: str, module: Params, dtype: jax.typing.DTypeLike | None) -> Params:
    if not any(is_adapter(name) for name in module):
        return module
    module = with_bias(module)
    base: dict[str, Any] = {name: leaf for name, leaf in module.items() if not is_adapter(name)}
    changed = changed_leaves(module)
    alone = {name: module[f"{TRAINED}{name}"] for name in changed - base.keys()}
    # A trained copy replaces the kernel as it is; it was not packed in training either.
    rounded = quant.packs_update(base.get("kernel")) and f"{TRAINED}kernel" not in module
    merged = alone | {
        name: _merged_by_layer(module, name, None if rounded else dtype) for name in changed & base.keys()
    }
    if rounded and "kernel" in changed:
        merged["kernel"] = base["kernel"].summed(merged["kernel"])
    return base | merged


def _merged_by_layer(module: Params, name: str, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    """`merged_leaf` without float32 copies of a whole stack, which are several times as large as the stack itself."""
    # Inside jit XLA makes no such copies, and a loop would be unrolled.
    whole = "lora_a" not in module or not module["lora_scale"].ndim or isinstance(module["lora_a"], jax.core.Tracer)
    if whole:
        return merged_leaf(module, name, dtype)
    count = len(module["lora_scale"])
    return jnp.stack([merged_leaf(layer_of(module, number), name, dtype) for number in range(count)])


def _with_update(weight: jax.Array, module: Params) -> jax.Array:
    if "lora_a" not in module:
        return weight
    scale = module["lora_scale"]
    delta = _product(module["lora_a"], module["lora_b"], weight.shape, scale.ndim)
    if "lora_start_a" in module:
        delta = delta - _product(module["lora_start_a"], module["lora_start_b"], weight.shape, scale.ndim)
    total = weight.astype(jnp.float32) + delta * scale.reshape(scale.shape + (1,) * (delta.ndim - scale.ndim))
    return total * gains(module)[..., None, :] if "lora_magnitude" in module else total


def _product(lora_a: jax.Array, lora_b: jax.Array, shape: tuple[int, ...], stacked: int) -> jax.Array:
    """A @ B in the weight's shape; factors with several input or output axes are flattened to matrices first."""
    if lora_a.ndim == lora_b.ndim == len(shape):
        return jnp.matmul(lora_a, lora_b, precision="highest")
    stack, rank = lora_a.shape[:stacked], lora_a.shape[-1]
    left, right = lora_a.reshape(*stack, -1, rank), lora_b.reshape(*stack, rank, -1)
    return jnp.matmul(left, right, precision="highest").reshape(shape)


def _with_tokens(weight: jax.Array, module: Params, *, rows: bool) -> jax.Array:
    if "lora_tokens" not in module:
        return weight
    ids, new = module["lora_token_ids"], module["lora_tokens"].astype(weight.dtype)
    return weight.at[ids].set(new) if rows else weight.at[:, ids].set(new.T)
