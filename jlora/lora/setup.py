"""New adapters for a param tree, initialised as in PEFT."""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import quant, tree
from jlora.errors import UserError
from jlora.lora import starts
from jlora.lora.config import LoraConfig
from jlora.lora.merging import TIED_HEADS, base_norms, column_norms, tied_heads
from jlora.lora.partition import TRAINED, is_adapter
from jlora.lora.targets import Candidate, InputAxes, Target, find_targets, matches, module_names, saves
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
    """The params with new adapters beside the targeted leaves. With the default initialisation the model's outputs do
    not change.

    q_proj/kernel [L, D, N]  →  q_proj/kernel [L, D, N]          untouched, packed or not
                                q_proj/lora_a [L, D, R] float32  trainable
                                q_proj/lora_b [L, R, N] float32  trainable
                                q_proj/lora_scale [L]   float32  alpha / r; 0 switches the adapter off
                                q_proj/lora_rank [L]    int32    only where layers differ: the rest is zero
                                q_proj/lora_dropout [L] float32  only with dropout: the probability

    `jlora.lora.partition` lists the other leaves that the config may add. A module's random key depends only on `key`
    and its path, so adding a target never changes how another one starts.

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
    seen = {"dense": tree.flatten(dense or {}), "gradients": tree.flatten(gradients or {})}
    targets = find_targets(params, config, input_axes)
    directions: dict[str, jax.Array] = {}
    if config.init_lora_weights == "eva":
        targets, directions = _eva(targets, config, moments)
    for target in targets:
        path_key = _path_key(key, target.path)
        seen_here = {name: values.get(f"{target.path}/kernel") for name, values in seen.items()}
        for name, leaf in _adapter(target, flat, config, path_key, directions.get(target.path), **seen_here).items():
            flat[f"{target.path}/{name}"] = leaf
    flat |= _biases(flat, config, {target.path: target for target in targets})
    flat |= saved_modules(flat, config)
    flat |= _tokens(flat, config)
    return tree.unflatten(flat | ties(flat))


def _adapter(
    target: Target,
    flat: dict[str, Any],
    config: LoraConfig,
    key: jax.Array,
    directions: jax.Array | None,
    dense: Any,
    gradients: Any,
) -> dict[str, jax.Array]:
    candidate = target.candidate
    before, after = candidate.factor_shapes
    settings, rank = candidate.stack_shape, max(target.ranks)
    ranks = np.array(target.ranks).reshape(settings)
    scales = jnp.asarray(np.array(target.scales, np.float32).reshape(settings))
    weight = flat.get(f"{candidate.path}/{candidate.leaf}")
    adapter: dict[str, jax.Array] = {}
    if starts.is_drawn(config.init_lora_weights):
        batch = before[: len(before) - candidate.axes[0]]
        lora_a, lora_b = _draw((*before, rank), (*batch, rank, *after), candidate, config, key)
    else:
        _require_kernel(target, config, weight)
        lora_a, lora_b = starts.from_weights(config, weight, dense, gradients, rank, scales, key)
    lora_a = lora_a if directions is None else directions[..., :rank]
    if (ranks != rank).any():
        used = jnp.asarray(np.arange(rank) < ranks[..., None])
        lora_a = lora_a * used.reshape(*settings, *[1] * (lora_a.ndim - 1 - len(settings)), rank)
        between = [1] * (lora_b.ndim - 1 - len(settings) - len(after))
        lora_b = lora_b * used.reshape(*settings, *between, rank, *[1] * len(after))
        adapter["lora_rank"] = jnp.asarray(ranks, jnp.int32)
    adapter |= {"lora_a": lora_a, "lora_b": lora_b, "lora_scale": scales}
    if starts.shifts_base(config.init_lora_weights):
        adapter |= {"lora_start_a": lora_a, "lora_start_b": lora_b}
    if config.lora_dropout and candidate.leaf == "kernel":
        adapter["lora_dropout"] = jnp.full(settings, config.lora_dropout, jnp.float32)
    if config.lora_bias:
        _require_linear(target, "lora_bias", weight)
        adapter["lora_bias"] = jnp.zeros((*settings, *after), jnp.float32)
    if config.use_dora:
        _require_linear(target, "use_dora", weight)
        adapter["lora_base_norm"] = base_norms(weight)
        adapter["lora_magnitude"] = column_norms(adapter | {"kernel": weight})
    return adapter


def _eva(
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
        vectors, variance = starts.principal_inputs({name: found[f"{target.path}/{name}"] for name in names})
        directions[target.path] = jnp.asarray(vectors)
        for rank, share in zip(target.ranks, variance.reshape(-1, variance.shape[-1]), strict=True):
            shares.append(share[: round(rank * config.eva_rho)])
            budget += rank
    ranks = iter(starts.share_out(shares, budget))
    # As in PEFT, a module keeps the scale that belongs to the rank asked for.
    shared = [dataclasses.replace(target, ranks=tuple(next(ranks) for _ in target.ranks)) for target in targets]
    return [target for target in shared if any(target.ranks)], directions


def _require_linear(target: Target, field: str, weight: Any) -> None:
    candidate = target.candidate
    if candidate.leaf != "kernel" or weight is None or candidate.axes != (1, 1):
        what = "a head that is its embedding" if weight is None else f"a {candidate.leaf} of shape {candidate.shape}"
        raise UserError(f"{field} is for linears; {target.path}: {what} cannot have it")


def _require_kernel(target: Target, config: LoraConfig, weight: Any) -> None:
    candidate = target.candidate
    if candidate.leaf != "kernel" or weight is None or candidate.is_parameter or candidate.axes != (1, 1):
        raise UserError(f"init_lora_weights={config.init_lora_weights!r} is for linears, and {target.path} is none")


def _biases(flat: dict[str, Any], config: LoraConfig, targets: dict[str, Target]) -> dict[str, jax.Array]:
    if config.bias == "none":
        return {}
    copies = {}
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        target = targets.get(module)
        if name != "bias" or (config.bias == "lora_only" and target is None):
            continue
        if config.bias == "lora_only" and 0 in target.ranks:
            raise UserError(
                f"bias='lora_only' needs all layers of a stack to be adapted; {module} has some that are not"
            )
        copies[f"{module}/{TRAINED}bias"] = leaf.astype(jnp.float32)
    if not copies:
        raise UserError(f"bias={config.bias!r}: these modules have no biases")
    return copies


def saved_modules(flat: dict[str, Any], config: LoraConfig) -> dict[str, jax.Array]:
    """The leaves of all modules selected by `modules_to_save`, unpacked and in float32, by the paths of their copies:
    norm/scale → norm/trained_scale. Leaves that are not floating-point have no gradient and are not copied.

    Raises:
        ValueError: no module's name ends in an item (all such are listed), or an item selects only some layers of a
            stack.
    """
    copies: dict[str, jax.Array] = {}
    used: set[str] = set()
    stack_of = tree.stacks_of(flat)
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        if is_adapter(path) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        names = module_names(module, leaf.shape[0] if leaf.ndim else 1, stack_of)
        hits = [saves(full, config) for full in names]
        if any(hits) and not all(hits):
            raise UserError(f"modules_to_save must mean all layers of a stack or none; of {module} it means some")
        if all(hits):
            dense = quant.unpacked(leaf)
            copies[f"{module}/{TRAINED}{name}"] = dense.astype(jnp.float32)
            used |= {item for item in config.modules_to_save if names[0].endswith(item)}
    for embedding, head in tied_heads(flat).items():  # a tied head trained separately starts as a copy of the embedding
        if saves(head, config):
            copies[f"{head}/{TRAINED}kernel"] = flat[f"{embedding}/embedding"].T.astype(jnp.float32)
            used |= {item for item in config.modules_to_save if head.endswith(item)}
    if missing := sorted(set(config.modules_to_save or ()) - used):
        raise UserError(f"modules_to_save: no module's name ends in {', '.join(missing)}")
    return copies


def _tokens(flat: dict[str, Any], config: LoraConfig) -> dict[str, jax.Array]:
    chosen = config.trainable_token_indices
    if not chosen:
        return {}
    embeddings = [path for path in TIED_HEADS if f"{path}/embedding" in flat]
    if not embeddings:
        raise UserError("trainable_token_indices: the tree has no input embedding that jlora knows")
    named = chosen if isinstance(chosen[0], tuple) else ((embeddings[0].split("/")[-1], chosen),)
    leaves: dict[str, jax.Array] = {}
    stack_of = tree.stacks_of(flat)
    for item, tokens in named:
        places = [
            path.rpartition("/")
            for path in flat
            if path.rpartition("/")[2] in ("kernel", "embedding")
            and matches(path.rpartition("/")[0].replace("/", "."), (item,))
        ]
        if len(places) != 1:
            raise UserError(f"trainable_token_indices: {item!r} names {len(places)} modules, expected one")
        module, _, name = places[0]
        weight = flat[f"{module}/{name}"]
        if stack_of(module) or weight.ndim != 2:
            raise UserError(
                f"trainable_token_indices: {item!r} is {module}/{name} {tuple(weight.shape)}; only an embedding and a "
                "head have rows of tokens"
            )
        rows = weight if name == "embedding" else weight.T
        if bad := [token for token in tokens if not 0 <= token < rows.shape[0]]:
            raise UserError(f"trainable_token_indices: {bad} are outside the vocabulary of {rows.shape[0]}")
        if f"{module}/lora_a" in flat:
            raise UserError(
                f"trainable_token_indices: {module} is adapted by LoRA already (as in PEFT, one or the other)"
            )
        ids = jnp.asarray(np.array(tokens, np.int32))
        leaves |= {f"{module}/lora_token_ids": ids, f"{module}/lora_tokens": rows[ids].astype(jnp.float32)}
    return leaves


def ties(flat: dict[str, Any]) -> dict[str, jax.Array]:
    """`lora_tied` leaves for the adapted embeddings that are also their model's head and act in both places."""
    marks = {}
    for embedding, head in tied_heads(flat).items():
        adapted = any(f"{embedding}/{name}" in flat for name in ("lora_a", f"{TRAINED}embedding"))
        if adapted and not any(path.startswith(f"{head}/") for path in flat):
            marks[f"{embedding}/lora_tied"] = jnp.int32(1)
    return marks


def _path_key(key: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _draw(
    a_shape: tuple[int, ...], b_shape: tuple[int, ...], candidate: Candidate, config: LoraConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A and B by PEFT's formulas: kaiming_uniform(a=sqrt(5)) is uniform in ±1/sqrt(fan in)."""
    inputs = math.prod(a_shape[-1 - candidate.axes[0] : -1])
    rank = a_shape[-1]
    key_a, key_b = jax.random.split(key)
    a_bound, b_bound = 1 / math.sqrt(inputs), 1 / math.sqrt(rank)
    start = config.init_lora_weights
    if candidate.leaf == "embedding" and start in (True, "default", "zero_a"):
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
            if candidate.axes != (1, 1):
                raise UserError(f"init_lora_weights='orthogonal' is for matrices; {candidate.path} has {a_shape[:-1]}")
            lora_a, lora_b = starts.orthogonal(a_shape, b_shape, key)
        case False:
            lora_b = jax.random.uniform(key_b, b_shape, jnp.float32, -b_bound, b_bound)
    return lora_a, lora_b
