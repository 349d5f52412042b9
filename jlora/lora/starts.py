"""Initialisations of A and B that are more than random numbers, by PEFT's formulas (`peft/tuners/lora/layer.py`).

PiSSA and OLoRA move a part of the base into the adapter. Here the base stays as it is: that part is kept as
`lora_start_a`, `lora_start_b` and subtracted from the update. The sum is the same, and one base can serve many
adapters.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import quant, tree
from jlora.errors import UserError
from jlora.lora.config import FROM_WEIGHTS, LoraConfig
from jlora.lora.sites import Site
from jlora.lora.targets import Target, find_targets
from jlora.types import Params


def is_drawn(start: bool | str) -> bool:
    """Whether this initialisation ignores the base weights."""
    return not (isinstance(start, str) and re.fullmatch(FROM_WEIGHTS, start))


def shifts_base(start: bool | str) -> bool:
    """Whether this initialisation's product is subtracted from the base."""
    return isinstance(start, str) and start.startswith(("pissa", "olora", "lora_ga"))


def drawn(
    a_shape: tuple[int, ...], b_shape: tuple[int, ...], site: Site, config: LoraConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A and B by PEFT's formulas: kaiming_uniform(a=sqrt(5)) is uniform in ±1/sqrt(fan in)."""
    inputs = math.prod(a_shape[-1 - site.axes[0] : -1])
    rank = a_shape[-1]
    key_a, key_b = jax.random.split(key)
    a_bound, b_bound = 1 / math.sqrt(inputs), 1 / math.sqrt(rank)
    start = config.init_lora_weights
    if site.leaf == "embedding" and start in (True, "default", "zero_a"):
        return jnp.zeros(a_shape, jnp.float32), jax.random.normal(key_b, b_shape, jnp.float32)
    lora_a = jax.random.uniform(key_a, a_shape, jnp.float32, -a_bound, a_bound)
    lora_b = jnp.zeros(b_shape, jnp.float32)
    match start:
        case "gaussian":
            lora_a = jax.random.normal(key_a, a_shape, jnp.float32) / rank
        case "zero_a":
            lora_a = jnp.zeros(a_shape, jnp.float32)
            lora_b = jax.random.uniform(key_b, b_shape, jnp.float32, -b_bound, b_bound)
        case "orthogonal":
            if site.axes != (1, 1):
                raise UserError(f"init_lora_weights='orthogonal' is for matrices; {site.path} has {a_shape[:-1]}")
            lora_a, lora_b = orthogonal(a_shape, b_shape, key)
        case False:
            lora_b = jax.random.uniform(key_b, b_shape, jnp.float32, -b_bound, b_bound)
    return lora_a, lora_b


def orthogonal(a_shape: tuple[int, ...], b_shape: tuple[int, ...], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Random A and B whose product is zero: their rows come from two halves of one orthogonal matrix."""
    *stack, inputs, rank = a_shape
    keys = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (*stack, rank, rank)))
    lora_a = jax.random.normal(keys[1], (*stack, inputs, rank // 2)) @ q[..., 0::2, :] / 10
    wide = jax.random.normal(keys[2], (*stack, b_shape[-1], rank // 2)) @ q[..., 1::2, :] / 10
    return lora_a, jnp.swapaxes(wide, -1, -2)


def from_weights(
    config: LoraConfig, kernel: Any, original: Any, gradient: Any, rank: int, scale: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A [*stack, D, R] and B [*stack, R, N] computed from a kernel [*stack, D, N], layer by layer.

    Args:
        original: the kernel before it was packed; only "loftq" needs it.
        gradient: the gradient of a loss with respect to the kernel; only "lora_ga" needs it.
    """
    start = str(config.init_lora_weights)
    if start == "loftq" and (original is None or not quant.is_packed(kernel)):
        raise UserError(
            "init_lora_weights='loftq' starts from what packing lost: it needs packed params, and the same params "
            "unpacked as init(…, dense=…)"
        )
    if start == "lora_ga" and gradient is None:
        raise UserError(
            "init_lora_weights='lora_ga' starts from gradients: give init(…, gradients=…) what "
            "jlora.lora.kernel_gradients returns"
        )
    layers = kernel.shape[:-2]
    scale = jnp.where(scale == 0, 1, scale)  # layers that are left alone, whose factors are zeroed later
    if not layers:
        return _one(config, kernel, original, gradient, rank, scale, key)
    pairs = [
        _one(
            config,
            *(_layer(value, i) for value in (kernel, original, gradient)),
            rank,
            scale[i],
            jax.random.fold_in(key, i),
        )
        for i in range(layers[0])
    ]
    return tuple(jnp.stack(parts) for parts in zip(*pairs, strict=True))


def _layer(value: Any, index: int) -> Any:
    return None if value is None else value[index]


def _one(
    config: LoraConfig, kernel: Any, original: Any, gradient: Any, rank: int, scale: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    start = str(config.init_lora_weights)
    dense = quant.unpacked(kernel).astype(jnp.float32)
    if rank * (2 if start == "lora_ga" else 1) > min(dense.shape):
        raise UserError(f"init_lora_weights={start!r}: rank {rank} is more than a kernel {dense.shape} has")
    if start == "loftq":  # PEFT does not divide by the scale here
        return _leading(jnp.asarray(original, jnp.float32) - dense, rank, 1.0)
    if start == "olora":
        q, r = jnp.linalg.qr(dense.T)
        return r[:rank].T, q[:, :rank].T
    if start == "lora_ga":
        return _from_gradient(config, jnp.asarray(gradient, jnp.float32), dense, rank, scale)
    if start == "pissa":
        return _leading(dense, rank, scale)
    return _leading_by_iteration(dense, rank, scale, int(start.rpartition("_")[2]), key)


def _from_gradient(
    config: LoraConfig, gradient: jax.Array, kernel: jax.Array, rank: int, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """LoRA-GA (Wang et al. 2024): A and B are singular vectors of the gradient; the direction says which ones."""
    left, values, right = jnp.linalg.svd(gradient, full_matrices=False)
    first, second = slice(0, rank), slice(rank, 2 * rank)
    of_a, of_b = {
        "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
        "A2rBr": (second, first),
        "ArB2r": (first, second),
    }[config.lora_ga_direction]
    lora_a, lora_b, values = left[:, of_a], values[of_b][:, None] * right[of_b], values[of_b]
    match config.lora_ga_scale:
        case "stable":
            lora_b = lora_b * (kernel.shape[1] ** 0.25 / config.lora_ga_gamma**0.5)
        case "weight_svd":
            lora_b = lora_b * (jnp.linalg.norm(kernel, 2) / values[0])
        case "gd_scale":
            lora_a, lora_b = lora_a / scale, lora_b / scale
    return lora_a, lora_b


def spread_over_data(
    targets: list[Target], config: LoraConfig, moments: Params | None
) -> tuple[list[Target], dict[str, jax.Array]]:
    """The targets with the common rank budget shared out among them, and the directions that each A starts from."""
    if moments is None:
        raise UserError(
            "init_lora_weights='eva' starts from a linear's inputs: give init(…, moments=…) what "
            "Model.input_moments returns, summed over some batches"
        )
    found = tree.flatten(moments)
    directions, shares, budget = {}, [], 0
    for target in targets:
        if f"{target.path}/gram" not in found:
            raise UserError(f"init_lora_weights='eva': no moments of the inputs of {target.path}")
        names = ("count", "sum", "gram")
        vectors, variance = principal_inputs({name: found[f"{target.path}/{name}"] for name in names})
        directions[target.path] = jnp.asarray(vectors)
        for rank, share in zip(target.ranks, variance.reshape(-1, variance.shape[-1]), strict=True):
            shares.append(share[: round(rank * config.eva_rho)])
            budget += rank
    ranks = iter(share_out(shares, budget))
    # As in PEFT, a module keeps the scale that belongs to the rank asked for.
    shared = [dataclasses.replace(target, ranks=tuple(next(ranks) for _ in target.ranks)) for target in targets]
    return [target for target in shared if any(target.ranks)], directions


def principal_inputs(moments: dict[str, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    """(directions [*stack, D, D], share of the variance along each [*stack, D]) of a linear's inputs, largest first.

    Args:
        moments: "count" [*stack], "sum" [*stack, D] and "gram" [*stack, D, D] of the inputs (`Model.input_moments`).
    """
    count, total, gram = (np.asarray(moments[name], np.float64) for name in ("count", "sum", "gram"))
    count = count[..., None, None]
    covariance = gram / count - (total[..., :, None] * total[..., None, :]) / count**2
    values, vectors = np.linalg.eigh(covariance)
    shares = np.maximum(values[..., ::-1], 0)
    return vectors[..., ::-1].astype(np.float32), shares / np.sum(shares, axis=-1, keepdims=True)


def share_out(shares: list[np.ndarray], budget: int) -> list[int]:
    """How many directions each linear gets from a common budget.

    The budget goes to the largest shares of all (EVA, Paischer et al. 2024).

    Args:
        shares: for every linear, its directions' shares of the variance, descending, as many as it may get.
        budget: how many directions to give out.
    """
    owners = np.concatenate([np.full(len(share), i) for i, share in enumerate(shares)])
    widest = np.argsort(-np.concatenate(shares), kind="stable")[:budget]
    return np.bincount(owners[widest], minlength=len(shares)).tolist()


def kernel_gradients(loss: Callable[[Params], jax.Array], params: Params, config: LoraConfig) -> Params:
    """The gradients of `loss` with respect to every kernel that `config` adapts.

    They are a tree of those kernels, float32, on the host. A packed kernel is differentiated at its unpacked values.

    One kernel (or stack of kernels) at a time, so that at most one dense gradient is on the device.

    Args:
        loss: params → scalar, for instance the mean over some batches.
    """
    flat = tree.flatten(params)
    gradients = {}
    for target in find_targets(params, config):
        path = f"{target.path}/kernel"
        if path not in flat:
            continue
        kernel = quant.unpacked(flat[path])

        def of_kernel(kernel: jax.Array, path: str = path) -> jax.Array:
            return loss(tree.unflatten(flat | {path: kernel}))

        gradients[path] = np.asarray(jax.jit(jax.grad(of_kernel))(kernel.astype(jnp.float32)))
    return tree.unflatten(gradients)


def _leading(matrix: jax.Array, rank: int, scale: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """(A, B) from the leading singular triples; each takes the square root of singular value / scale."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale)
    return left[:, :rank] * root[None, :], root[:, None] * right[:rank]


def _leading_by_iteration(
    matrix: jax.Array, rank: int, scale: jax.Array, iterations: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Approximates `_leading` by subspace iteration (Halko et al. 2011), which is faster for large kernels."""
    basis, _ = jnp.linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[1], rank)))
    for _ in range(iterations):
        basis, _ = jnp.linalg.qr(matrix @ jnp.linalg.qr(matrix.T @ basis)[0])
    lora_a, lora_b = _leading(basis.T @ matrix, rank, scale)
    return basis @ lora_a, lora_b
