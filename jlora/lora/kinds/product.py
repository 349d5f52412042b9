"""LoRA itself (Hu et al. 2021): the update is a product of two narrow factors."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import quant
from jlora.errors import UserError
from jlora.lora import starts
from jlora.lora.kinds.banked import chosen, is_chosen, require_chosen
from jlora.lora.kinds.kind import DROPOUT, RANK, SCALE, SETTINGS, Call, Kind, Leaf, Output, Start, over
from jlora.lora.sites import MAIN
from jlora.lora.targets import Target
from jlora.types import Params

A = Leaf(
    "lora_a",
    trained=True,
    axes=("inputs", "rank"),
    absent="module",
    peft="lora_A.weight",
    peft_embedding="lora_embedding_A",
    turned=True,
)
B = Leaf(
    "lora_b",
    trained=True,
    axes=("rank", "outputs"),
    like_b=True,
    absent="module",
    peft="lora_B.weight",
    peft_embedding="lora_embedding_B",
    turned=True,
    scaled=True,
)
# The product that is subtracted from the base, where training started from a part of it (PiSSA and its like).
START_A = Leaf("lora_start_a", axes=A.axes, absent="any")
START_B = Leaf("lora_start_b", axes=B.axes, absent="any")
# An embedding's adapter that acts in its head too.
TIED = Leaf("lora_tied")


class Product(Kind):
    """The update scale · lora_a @ lora_b, added to a kernel, an embedding, or the kernels of experts."""

    leaves = (A, B, START_A, START_B, *SETTINGS)
    title = "a product of two factors"
    peft_type = "LORA"
    additive = True

    def wanted(self, config: Any) -> bool:
        return config.peft_type == self.peft_type

    def start(self, start: Start) -> dict[str, jax.Array]:
        """New factors for a module.

        Its random key depends only on the key and its path, so adding a target never changes how another one starts.
        """
        found = {}
        for target in start.targets:
            found |= {f"{target.path}/{name}": leaf for name, leaf in _started(target, start).items()}
        return found

    def changes(self, module: Mapping[str, Any]) -> set[str]:
        return {name for name in MAIN if name in module} if A.name in module else set()

    def output(self, output: Output, call: Call) -> Output:
        """The factors multiply in x's dtype, with sums in float32."""
        x, module = call.x, call.module
        if A.name not in module:
            return output
        require_chosen(module, x)
        if is_chosen(module):
            return output.plus(_of_rows(x, module))
        hidden = call.matmul(call.dropped, module[A.name]) * module[SCALE.name].astype(x.dtype)
        update = call.matmul(hidden, module[B.name])
        if START_A.name in module:
            start = call.matmul(x, module[START_A.name]) * module[SCALE.name]
            update = update - call.matmul(start, module[START_B.name])
        return output.plus(update)

    def rows(self, rows: jax.Array, tokens: jax.Array, module: Params) -> jax.Array:
        if A.name not in module:
            return rows
        require_chosen(module, tokens)
        lora_a, lora_b, factor = self.factors(module)
        if is_chosen(module):
            ids, scale = chosen(module)
            of_tokens = tokens.reshape(tokens.shape[0], 1, -1)
            hidden = lora_a[ids[..., None], of_tokens] * scale[..., None, None]  # [B, K, T, R]
            added = _banked("bktr,bkrd->btd", hidden, lora_b[ids]).reshape(rows.shape)
        else:
            added = quant.matmul(jnp.take(lora_a, tokens, axis=0) * factor, lora_b)
        return (rows + added).astype(rows.dtype)

    def logits(self, logits: jax.Array, x: jax.Array, module: Params) -> jax.Array:
        if TIED.name not in module or A.name not in module:
            return logits
        lora_a, lora_b, scale = self.factors(module)
        return logits + quant.matmul(quant.matmul(x.astype(lora_b.dtype), lora_b.T) * scale, lora_a.T)

    def merged(self, value: jax.Array, name: str, module: Params) -> jax.Array:
        if name not in self.changes(module):
            return value
        scale = module[SCALE.name]
        delta = _product(module[A.name], module[B.name], value.shape, scale.ndim)
        if START_A.name in module:
            delta = delta - _product(module[START_A.name], module[START_B.name], value.shape, scale.ndim)
        return value.astype(jnp.float32) + delta * over(scale, delta.ndim)

    def as_product(self, module: Params) -> Params:
        """With `lora_start_a` and `lora_start_b` made part of A and B, whose rank doubles."""
        if START_A.name not in module:
            return module
        lora_a, lora_b, _ = self.factors(module)
        kept = {name: leaf for name, leaf in module.items() if name not in (START_A.name, START_B.name)}
        if RANK.name in module:  # the ranks that a layer uses must come first
            rank, width = module[RANK.name][..., None], module[A.name].shape[-1]
            used = jnp.arange(2 * width).reshape((1,) * (rank.ndim - 1) + (-1,)) % width < rank
            order = jnp.argsort(~used, axis=-1, stable=True)
            lora_a = jnp.take_along_axis(lora_a, order[..., None, :], axis=-1)
            lora_b = jnp.take_along_axis(lora_b, order[..., :, None], axis=-2)
            kept[RANK.name] = 2 * module[RANK.name]
        return kept | {A.name: lora_a, B.name: lora_b}

    def factors(self, module: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(A, B, scale) of the whole update: what it started from is a part of them."""
        lora_a, lora_b = module[A.name], module[B.name]
        if START_A.name in module:
            lora_a = jnp.concatenate([lora_a, module[START_A.name]], axis=-1)
            lora_b = jnp.concatenate([lora_b, -module[START_B.name]], axis=-2)
        return lora_a, lora_b, module[SCALE.name]


PRODUCT = Product()


def settings(target: Target, start: Start) -> dict[str, jax.Array]:
    """The leaves that every kind of update has: scale, rank where the layers' differ, and dropout."""
    shape, ranks = target.site.stack_shape, target.rank_array
    found = {SCALE.name: target.scale_array}
    if (ranks != ranks.max()).any():
        found[RANK.name] = jnp.asarray(ranks, jnp.int32)
    if start.config.lora_dropout and target.site.leaf == "kernel":
        found[DROPOUT.name] = jnp.full(shape, start.config.lora_dropout, jnp.float32)
    return found


def _started(target: Target, start: Start) -> dict[str, jax.Array]:
    """The leaves of one module."""
    site, config, path = target.site, start.config, target.path
    (before, after), rank = site.factor_shapes, max(target.ranks)
    key, own = start.key_of(path), settings(target, start)
    if starts.is_drawn(config.init_lora_weights):
        batch = before[: len(before) - site.axes[0]]
        lora_a, lora_b = starts.drawn((*before, rank), (*batch, rank, *after), site, config, key)
    else:
        weight = start.leaves.get(f"{path}/{site.leaf}")
        if not site.is_linear:
            raise UserError(f"init_lora_weights={config.init_lora_weights!r} is for linears; {path} is not one")
        given = (values.get(f"{path}/kernel") for values in (start.dense, start.gradients))
        lora_a, lora_b = starts.from_weights(config, weight, *given, rank, own[SCALE.name], key)
    if path in start.directions:
        lora_a = start.directions[path][..., :rank]
    if RANK.name in own:
        stack = site.stack_shape
        used = jnp.asarray(np.arange(rank) < target.rank_array[..., None])
        lora_a = lora_a * used.reshape(*stack, *[1] * (lora_a.ndim - 1 - len(stack)), rank)
        between = [1] * (lora_b.ndim - 1 - len(stack) - len(after))
        lora_b = lora_b * used.reshape(*stack, *between, rank, *[1] * len(after))
    found = {A.name: lora_a, B.name: lora_b} | own
    if starts.shifts_base(config.init_lora_weights):
        found |= {START_A.name: lora_a, START_B.name: lora_b}
    return found


def _of_rows(x: jax.Array, module: Params) -> jax.Array:
    """What a bank's adapters add to each row: Σ weight · scale · (x @ lora_a @ lora_b) over its K."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    ids, scale = chosen(module)
    lora_a, lora_b = module[A.name][ids], module[B.name][ids]  # [B, K, D, R], [B, K, R, N]
    hidden = _banked("btd,bkdr->btkr", rows, lora_a) * scale[:, None, :, None]
    return _banked("btkr,bkrn->btn", hidden, lora_b).reshape(*x.shape[:-1], -1)


def _banked(axes: str, x: jax.Array, factor: jax.Array) -> jax.Array:
    """The product with a bank's factor: both in the factor's dtype, the sums in float32."""
    return jnp.einsum(axes, x.astype(factor.dtype), factor, preferred_element_type=jnp.float32)


def _product(lora_a: jax.Array, lora_b: jax.Array, shape: tuple[int, ...], stacked: int) -> jax.Array:
    """A @ B in the weight's shape; factors with several input or output axes are flattened to matrices first."""
    if lora_a.ndim == lora_b.ndim == len(shape):
        return jnp.matmul(lora_a, lora_b, precision="highest")
    stack, rank = lora_a.shape[:stacked], lora_a.shape[-1]
    left, right = lora_a.reshape(*stack, -1, rank), lora_b.reshape(*stack, rank, -1)
    return jnp.matmul(left, right, precision="highest").reshape(shape)
