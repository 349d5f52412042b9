"""Linears, experts' linears and embeddings: a base product, packed or not, and every kind of adapter after it."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jlora import quant, sharding
from jlora.errors import UserError
from jlora.lora.kinds import KINDS, PRODUCT, TIED, changed_leaves, kinds_in
from jlora.lora.kinds.banked import is_chosen
from jlora.lora.kinds.copies import resolve
from jlora.lora.kinds.kind import SCALE, Call, Output, row
from jlora.lora.kinds.product import START_A, A, B
from jlora.lora.merging import merged_leaf
from jlora.types import SAVED, Params


def linear(x: Float[Array, "*batch D"], module: Params, *, key: jax.Array | None = None) -> Float[Array, "*batch N"]:
    """x @ kernel + bias, with what every kind of adapter among the module's leaves makes of it (`jlora.lora.kinds`).

    Args:
        key: turns on `lora_dropout`; without it nothing is dropped.

    Raises:
        ValueError: `module` belongs to a bank, and no adapters are chosen, or they are chosen for another number of
            rows.
    """
    return _computed(Call(x, resolve(module), key, quant.matmul))


def grouped_linear(x: Float[Array, "rows D"], sizes: Int[Array, "E"], module: Params) -> Float[Array, "rows N"]:
    """`linear` with a kernel for each of E groups of rows: the first sizes[0] rows take kernel[0], and so on.

    Every leaf except `lora_scale`, a scalar, has a leading axis of groups.

    Args:
        sizes: how many rows each group has.
    """
    return _computed(Call(x, resolve(module), None, functools.partial(quant.grouped_matmul, sizes=sizes), sizes))


def update(x: Float[Array, "*batch D"], module: Params, *, key: jax.Array | None = None) -> Float[Array, "*batch N"]:
    """What the adapter adds to the output: scale · (dropout(x) @ lora_a @ lora_b + lora_bias).

    If the module has `lora_start_a`, the update that training started from is subtracted.

    Args:
        key: turns on `lora_dropout`; without it nothing is dropped.

    Raises:
        ValueError: as in `linear`.
    """
    output, call = Output(None), Call(x, module, key, quant.matmul)
    for kind in KINDS:
        output = kind.output(output, call) if kind.additive else output
    return output.total()


def embed(tokens: Int[Array, "*batch"], module: Params) -> Float[Array, "*batch D"]:
    """Rows of `embedding` [V, D] plus the update scale · lora_a[token] @ lora_b; tokens with trained rows take those.

    Raises:
        ValueError: as in `linear`.
    """
    module = resolve(module)
    rows = jnp.take(module["embedding"], tokens, axis=0)
    for kind in KINDS:
        rows = kind.rows(rows, tokens, module)
    return rows


def unembed(x: Float[Array, "*batch D"], module: Params) -> Float[Array, "*batch V"]:
    """The float32 logits x @ embedding.T of a tied head, with the embedding's adapter if it has `lora_tied`."""
    used = resolve(module) if TIED.name in module else module
    embedding = used["embedding"].astype(x.dtype)
    y = jnp.einsum("...d,vd->...v", x, embedding, preferred_element_type=jnp.float32)
    for kind in KINDS:
        y = kind.logits(y, x, module)
    return y


def _computed(call: Call) -> jax.Array:
    x, module = call.x, call.module
    kinds = KINDS
    if quant.packs_update(module["kernel"]) and "kernel" in changed_leaves(module):
        output = Output(call.matmul(x, _packed_sum(call)))
        kinds = tuple(kind for kind in KINDS if "kernel" not in kind.changes(module))
    elif _merging_pays(call):
        output, kinds = Output(merged(x, module)), ()
    else:
        output = Output(call.matmul(x, module["kernel"]))
    for kind in kinds:
        output = kind.output(output, call)
    y = output.total().astype(x.dtype)
    if "bias" in module:
        y = y + _bias(call, y.ndim).astype(y.dtype)
    return checkpoint_name(y, SAVED)


def _bias(call: Call, ndim: int) -> jax.Array:
    """The bias, to be added to outputs with this many axes: one for all rows, or one for each row's group."""
    if call.sizes is None:
        return row(call.module["bias"], ndim)
    groups = jnp.arange(call.sizes.shape[0], dtype=jnp.int32)
    return call.module["bias"][jnp.repeat(groups, call.sizes, total_repeat_length=call.x.shape[0])]


def _packed_sum(call: Call) -> jax.Array:
    """The values of the packed sum of kernel and update: the merged weight that a `Rounded` kernel is trained for."""
    if is_chosen(call.module) or call.drops:
        what = "adapters of a bank" if is_chosen(call.module) else "lora_dropout"
        raise UserError(f"a kernel that is packed together with its update (merge_aware) cannot have {what}")
    return call.module["kernel"].used(merged_leaf(call.module, "kernel"))


def _merging_pays(call: Call) -> bool:
    """Whether it is cheaper to add the update to the kernel than to the outputs.

    In the backward pass the choice is between the kernel and the inputs' gradients.

    Only on CPUs: elsewhere a float32 product may round its operands to fewer bits, which would lose a small update in
    the sum.
    """
    x, module = call.x, call.module
    plain = kinds_in(module) == (PRODUCT,) and module["kernel"].ndim == module[A.name].ndim == 2
    if not plain or START_A.name in module or is_chosen(module) or call.drops:
        return False
    if sharding.ways(sharding.TOKENS) > 1:  # in flat rows the tokens of one shard are not contiguous
        return False
    if sharding.is_apart():  # the backward pass below does not sum over devices
        return False
    inputs, outputs = module["kernel"].shape
    exact = jax.default_backend() == "cpu" and x.dtype == module[A.name].dtype == jnp.float32
    return exact and (x.size // inputs) * (inputs + outputs) > inputs * outputs


def merged(x: Float[Array, "*batch D"], module: Params) -> Float[Array, "*batch N"]:
    """x @ (kernel + scale · lora_a @ lora_b) as one wide product; the backward pass recomputes the sum."""
    rows = x.reshape(-1, x.shape[-1])
    y = _merged(rows, *(module[name] for name in ("kernel", A.name, B.name, SCALE.name)))
    return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def _merged(
    x: jax.Array, kernel: jax.Array | quant.PackedArray, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array
) -> jax.Array:
    return x @ _sum(kernel, lora_a, lora_b, scale)


def _merged_forward(*inputs: jax.Array | quant.PackedArray) -> tuple[jax.Array, tuple]:
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


def _sum(kernel: jax.Array | quant.PackedArray, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array) -> jax.Array:
    return quant.unpacked(kernel).astype(jnp.float32) + (lora_a * scale) @ lora_b
