"""Linears, experts' linears and embeddings: a base product, packed or not, together with its adapter."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jlora import quant, sharding
from jlora.errors import UserError
from jlora.lora.merging import Kernel, gains, merged_leaf
from jlora.lora.partition import resolve
from jlora.types import SAVED, Params


def linear(x: Float[Array, "*batch D"], module: Params, *, key: jax.Array | None = None) -> Float[Array, "*batch N"]:
    """x @ kernel + bias + update(x), with whichever leaves `module` holds (see `jlora.lora.partition`).

    The update multiplies in x's dtype, with sums in float32 (LoRA, Hu et al. 2021). With `lora_magnitude` every
    output's weights are rescaled to that length (DoRA, Liu et al. 2024).

    Args:
        key: turns on `lora_dropout`; without it nothing is dropped.

    Raises:
        ValueError: `module` belongs to a bank, and no adapters are chosen, or they are chosen for another number of
            rows.
    """
    module = resolve(module)
    _check_bank(module, x)
    if quant.packs_update(module["kernel"]) and "lora_a" in module:
        y = quant.matmul(x, _packed_sum(module, key))
        if "lora_bias" in module:
            y = y + _row(module["lora_bias"] * module["lora_scale"], y.ndim).astype(y.dtype)
    elif _merging_pays(x, module, key):
        y = merged(x, module)
    elif "lora_magnitude" in module:
        y = _dora(x, module, key)
    else:
        y = quant.matmul(x, module["kernel"])
        if "lora_a" in module:
            y = y + update(x, module, key=key).astype(y.dtype)
    if "bias" in module:
        y = y + _row(module["bias"], y.ndim).astype(y.dtype)
    if "lora_tokens" in module:  # in a head, new rows of the embedding are columns of the logits
        y = y.at[..., module["lora_token_ids"]].set(x @ module["lora_tokens"].astype(x.dtype).T)
    return checkpoint_name(y, SAVED)


def update(x: Float[Array, "*batch D"], module: Params, *, key: jax.Array | None = None) -> Float[Array, "*batch N"]:
    """What the adapter adds to the output: scale · (dropout(x) @ lora_a @ lora_b + lora_bias), minus the update that
    training started from if the module has `lora_start_a`.

    Args:
        key: turns on `lora_dropout`; without it nothing is dropped.

    Raises:
        ValueError: as in `linear`.
    """
    _check_bank(module, x)
    if "lora_ids" in module:
        return _update_by_row(x, module)
    lora_a, lora_b = module["lora_a"], module["lora_b"]
    hidden = quant.matmul(_dropped(x, module, key), lora_a) * module["lora_scale"].astype(x.dtype)
    y = quant.matmul(hidden, lora_b)
    if "lora_start_a" in module:
        start = quant.matmul(x, module["lora_start_a"]) * module["lora_scale"]
        y = y - quant.matmul(start, module["lora_start_b"])
    if "lora_bias" in module:
        y = y + _row(module["lora_bias"] * module["lora_scale"], y.ndim)
    return y


def _check_bank(module: Params, x: jax.Array) -> None:
    """Raises UserError if a bank's adapters are not chosen, or are chosen for another number of rows."""
    if "lora_ids" in module:
        if (chosen := module["lora_ids"].shape[0]) != x.shape[0]:
            raise UserError(
                f"found adapters chosen for {chosen} rows, and a batch of {x.shape[0]}: "
                "Bank.choose takes one choice for every row"
            )
    elif "lora_scale" in module and module["lora_scale"].ndim:
        raise UserError(
            f"these are the params of a bank of {module['lora_scale'].shape[0] - 1} adapters: "
            "give the model those of Bank.choose, with a choice for every row, or of Bank.alone"
        )


def _update_by_row(x: jax.Array, module: Params) -> jax.Array:
    """What a bank's adapters add to each row: Σ weight · scale · (x @ lora_a @ lora_b + lora_bias) over its K."""
    ids, rows = module["lora_ids"], x.reshape(x.shape[0], -1, x.shape[-1])
    lora_a, lora_b = module["lora_a"][ids], module["lora_b"][ids]  # [B, K, D, R], [B, K, R, N]
    scale = module["lora_scale"][ids] * module["lora_weights"]
    hidden = jnp.einsum("btd,bkdr->btkr", rows.astype(lora_a.dtype), lora_a) * scale[:, None, :, None]
    y = jnp.einsum("btkr,bkrn->btn", hidden, lora_b)
    if "lora_bias" in module:
        y = y + jnp.einsum("bk,bkn->bn", scale, module["lora_bias"][ids])[:, None]
    return y.reshape(*x.shape[:-1], -1)


def _packed_sum(module: Params, key: jax.Array | None) -> jax.Array:
    """The values of the packed sum of kernel and update: the merged weight that a `Rounded` kernel is trained for."""
    if "lora_ids" in module or (key is not None and "lora_dropout" in module):
        what = "adapters of a bank" if "lora_ids" in module else "lora_dropout"
        raise UserError(f"a kernel that is packed together with its update (merge_aware) goes without {what}")
    return module["kernel"].used(merged_leaf(module, "kernel"))


def embed(tokens: Int[Array, "*batch"], module: Params) -> Float[Array, "*batch D"]:
    """Rows of `embedding` [V, D] plus the update scale · lora_a[token] @ lora_b; tokens with trained rows take those.

    Raises:
        ValueError: as in `linear`.
    """
    module = resolve(module)
    rows = jnp.take(module["embedding"], tokens, axis=0)
    _check_bank(module, tokens)
    if "lora_ids" in module:
        ids, scale = module["lora_ids"], module["lora_scale"][module["lora_ids"]] * module["lora_weights"]
        of_tokens = tokens.reshape(tokens.shape[0], 1, -1)
        hidden = module["lora_a"][ids[..., None], of_tokens] * scale[..., None, None]  # [B, K, T, R]
        added = jnp.einsum("bktr,bkrd->btd", hidden, module["lora_b"][ids]).reshape(rows.shape)
        rows = (rows + added).astype(rows.dtype)
    elif "lora_a" in module:
        hidden = jnp.take(module["lora_a"], tokens, axis=0) * module["lora_scale"]
        rows = (rows + quant.matmul(hidden, module["lora_b"])).astype(rows.dtype)
    if "lora_tokens" in module:
        matches = tokens[..., None] == _row(module["lora_token_ids"], tokens.ndim + 1)
        new = matches.astype(rows.dtype) @ module["lora_tokens"].astype(rows.dtype)
        rows = jnp.where(jnp.any(matches, axis=-1, keepdims=True), new, rows)
    return rows


def unembed(x: Float[Array, "*batch D"], module: Params) -> Float[Array, "*batch V"]:
    """The float32 logits x @ embedding.T of a tied head, with the embedding's adapter if it has `lora_tied`."""
    tied = resolve(module) if "lora_tied" in module else module
    embedding = tied["embedding"].astype(x.dtype)
    y = jnp.einsum("...d,vd->...v", x, embedding, preferred_element_type=jnp.float32)
    if "lora_tied" in module and "lora_a" in module:
        hidden = quant.matmul(x.astype(module["lora_b"].dtype), module["lora_b"].T) * module["lora_scale"]
        y = y + quant.matmul(hidden, module["lora_a"].T)
    if "lora_tokens" in module:
        new = x @ module["lora_tokens"].astype(x.dtype).T
        y = y.at[..., module["lora_token_ids"]].set(new.astype(y.dtype))
    return y


def grouped_linear(x: Float[Array, "rows D"], sizes: Int[Array, "E"], module: Params) -> Float[Array, "rows N"]:
    """`linear` with a kernel for each of E groups of rows: the first sizes[0] rows take kernel[0], and so on.

    Every leaf except `lora_scale`, a scalar, has a leading axis of groups.

    Args:
        sizes: how many rows each group has.
    """
    module = resolve(module)
    if quant.packs_update(module["kernel"]) and "lora_a" in module:
        return checkpoint_name(quant.grouped_matmul(x, _packed_sum(module, None), sizes), SAVED)
    y = quant.grouped_matmul(x, module["kernel"], sizes)
    if "lora_a" in module:
        lora_a, lora_b = module["lora_a"], module["lora_b"]
        hidden = quant.grouped_matmul(x, lora_a, sizes) * module["lora_scale"].astype(x.dtype)
        y = y + quant.grouped_matmul(hidden, lora_b, sizes)
    return checkpoint_name(y, SAVED)


def _dora(x: jax.Array, module: Params, key: jax.Array | None) -> jax.Array:
    """gain · (x @ kernel + update(x)); with dropout the base product is rescaled only for what is kept, as in PEFT."""
    y = quant.matmul(x, module["kernel"]).astype(jnp.float32)
    gain = _row(gains(module), y.ndim)
    kept = y
    if key is not None and "lora_dropout" in module:
        kept = quant.matmul(_dropped(x, module, key), module["kernel"]).astype(jnp.float32)
    return (y + (gain - 1) * kept + gain * update(x, module, key=key).astype(jnp.float32)).astype(x.dtype)


def _dropped(x: jax.Array, module: Params, key: jax.Array | None) -> jax.Array:
    if key is None or "lora_dropout" not in module:
        return x
    rate = module["lora_dropout"]
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _row(vector: jax.Array, ndim: int) -> jax.Array:
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def merged(x: Float[Array, "*batch D"], module: Params) -> Float[Array, "*batch N"]:
    """x @ (kernel + scale · lora_a @ lora_b) as one wide product; the backward pass recomputes the sum."""
    rows = x.reshape(-1, x.shape[-1])
    y = _merged(rows, module["kernel"], module["lora_a"], module["lora_b"], module["lora_scale"])
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _merging_pays(x: jax.Array, module: Params, key: jax.Array | None) -> bool:
    """Whether it is cheaper to add the update to the kernel than to the outputs (and, in the backward pass, to the
    inputs' gradients).

    Only on CPUs: elsewhere a float32 product may round its operands to fewer bits, which would lose a small update in
    the sum.
    """
    more = ("lora_magnitude", "lora_bias", "lora_start_a", "lora_ids")
    if "lora_a" not in module or any(name in module for name in more) or (key is not None and "lora_dropout" in module):
        return False
    if sharding.ways(sharding.TOKENS) > 1:  # in flat rows the tokens of one shard are not contiguous
        return False
    inputs, outputs = module["kernel"].shape
    exact = jax.default_backend() == "cpu" and x.dtype == module["lora_a"].dtype == jnp.float32
    return exact and (x.size // inputs) * (inputs + outputs) > inputs * outputs


@jax.custom_vjp
def _merged(x: jax.Array, kernel: Kernel, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array) -> jax.Array:
    return x @ _sum(kernel, lora_a, lora_b, scale)


def _merged_forward(*inputs: Kernel) -> tuple[jax.Array, tuple]:
    return _merged(*inputs), inputs


def _merged_backward(inputs: tuple, grad: jax.Array) -> tuple:
    x, kernel, lora_a, lora_b, scale = inputs
    hidden, grad_hidden = x @ lora_a, grad @ lora_b.T
    # XLA's CPU backend is slow when the wide operand is transposed. So the wide operand comes second, and the barriers
    # keep XLA from folding the narrow transposes into the products.
    hold = jax.lax.optimization_barrier
    grad_a = hold(hold(grad_hidden * scale).T @ x).T
    grad_b = hold(hidden * scale).T @ grad
    grad_kernel = None if quant.is_packed(kernel) else (x.T @ grad).astype(kernel.dtype)
    return grad @ _sum(kernel, lora_a, lora_b, scale).T, grad_kernel, grad_a, grad_b, jnp.sum(hidden * grad_hidden)


_merged.defvjp(_merged_forward, _merged_backward)


def _sum(kernel: Kernel, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array) -> jax.Array:
    return quant.unpacked(kernel).astype(jnp.float32) + (lora_a * scale) @ lora_b
