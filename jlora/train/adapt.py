"""What a run starts with: a base with its adapter, or one whose own weights are trained."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jlora import checkpoint, hub, lora, sharding, tree
from jlora.errors import UserError
from jlora.models import Model
from jlora.quant import packs_update, stored
from jlora.train.algorithms import ALGORITHMS
from jlora.train.algorithms.algorithm import Base
from jlora.train.config import RunConfig
from jlora.types import Params


def adapt(model: Model, params: Params, config: RunConfig, fixed: Params | None = None) -> Params:
    """The params with a new adapter or the one of `model.adapter`, and for a reward model with its score head.

    Full fine-tuning adds no adapter.

    Args:
        fixed: for a resumed run, the adapter's frozen half as the run began; it replaces the new adapter's.

    Raises:
        ValueError: the model or `model.adapter` is a reward model but the algorithm trains a policy; a reward model's
            own head would not be trained; settings of the group `lora` would have no effect on `model.adapter`; rows
            are longer than the model's positions; `fixed` does not fit the adapter; weights that full fine-tuning is
            to train are packed.
    """
    model.require_positions(config.train.seq_len, "train.seq_len")
    _warn_of_experts(model, params)
    return _with_fixed(_adapted(model, params, config), fixed or {})


def based(
    config: RunConfig,
    model: Model,
    params: Params,
    mesh: Mesh,
    *,
    tokenizer: Any = None,
    workdir: Any = None,
    place: Callable[[Params, Mesh], Params] = sharding.shard,
) -> Base:
    """What an algorithm starts from; its model computes attention in the form that the settings name.

    Args:
        params: with the adapter; for several adapters without, as their plan adds them to the base.
        place: see `Base`.
    """
    frozen, trainable = lora.split(params, config.trains)
    start = lora.adapter_leaves(params) if config.model.adapter else {}
    if config.lora is None and ALGORITHMS[config.algorithm].refers:
        start = trainable
    return Base(
        model=dataclasses.replace(model, attention=config.model.attention),
        tokenizer=tokenizer,
        mesh=mesh,
        frozen=place(frozen, mesh),
        trainable=trainable,
        reference=place(start, mesh),
        workdir=workdir,
        place=place,
    )


def _adapted(model: Model, params: Params, config: RunConfig) -> Params:
    key = jax.random.key(config.train.seed)
    if config.lora is None:
        config.full.check(params)
    elif not config.model.adapter:
        params = lora.init(params, config.lora, key)
    else:
        if config.lora != lora.LoraConfig():
            raise UserError(
                f"model.adapter is {config.model.adapter}: an adapter brings its own settings, so those of the group "
                f"lora must stay at their defaults; found {config.lora}"
            )
        params = hub.load_adapter(params, config.model.adapter, config.model.path)
    head = params.get("score")
    if not ALGORITHMS[config.algorithm].scores:
        if head is not None:
            source = config.model.adapter or config.model.path
            raise UserError(f"{source} is a reward model (it has a score head); {config.algorithm} trains a policy")
        return params
    if head is None:
        return model.add_score(params, jax.random.fold_in(key, 1))
    if not any(config.trains(f"score/{name}") for name in head):
        raise UserError(
            f"{config.model.path} is a reward model already, whose head would stay as it is: set "
            "lora.modules_to_save=('score',) to train a copy of it (with lora=None, have full.trainable choose it)"
        )
    return params


def _warn_of_experts(model: Model, params: Params) -> None:
    """Warns before the run, rather than after it, if no transformers folder can hold what it trains."""
    flat = tree.flatten(params)
    if not any(map(packs_update, flat.values())):
        return
    merged = jax.eval_shape(lambda leaves: {path: stored(leaf) for path, leaf in leaves.items()}, flat)
    if not hub.can_hold_packed_experts(model.config.model_type, merged):
        warnings.warn(
            "no folder for transformers can hold what this run is trained to be (merge_aware), because experts are "
            "packed: it holds only gpt-oss's, in MXFP4, and nothing else that is packed. Export this run as GGUF, or "
            'leave experts out with model.quant = {"merge_aware": True, "rules": [[".*/experts/.*", None], '
            '[".*layers/.*/kernel", "nf4"]]}',
            stacklevel=2,
        )


def _with_fixed(params: Params, fixed: Params) -> Params:
    kept = tree.flatten(fixed)
    here = {path: leaf.shape for path, leaf in tree.flatten(lora.adapter_leaves(lora.split(params)[0])).items()}
    there = {path: leaf.shape for path, leaf in kept.items()}
    if kept and (differences := checkpoint.compare(there, here)):
        raise UserError("the run was begun with an adapter of another form:\n  " + "\n  ".join(differences))
    return tree.map_with_path(lambda path, leaf: jnp.asarray(kept[path]) if path in kept else leaf, params)
