"""Adapters for models that know nothing of them: any Flax model's function over a tree whose leaves are the sums."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jlora import quant, tree
from jlora.lora.merge import MAIN, merge
from jlora.types import Params


def bind(apply: Callable[..., Any]) -> Callable[..., Any]:
    """apply(params, …) for params that hold adapters and packed leaves: it is given the base tree with every adapter
    added and every packed leaf unpacked, inside whatever jit it is called in.

    The sums are formed again in the backward pass and never kept, so memory is that of the base and of what `apply`
    keeps itself. For jlora's own models there is no need of this: they take the update beside the base product, which
    costs less.
    """

    def adapted(params: Params, *args: Any, **kwargs: Any) -> Any:
        def call(params: Params) -> Any:
            return apply(merge(_unpacked(params)), *args, **kwargs)

        return jax.checkpoint(call, policy=_keep_all_but(_formed_sizes(params)))(params)

    return adapted


def from_nnx(model: nnx.Module) -> tuple[Callable[..., Any], Params]:
    """(apply, params) of an NNX model: its parameters as a nested dict, and the model as a function of such a dict.

    apply(params, *args) calls the model with these parameters; its other state (batch statistics, random keys) is as
    it was when the model was taken apart, and changes are dropped. Lists of modules become dicts with "0", "1", ….
    """
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    pure = nnx.to_pure_dict(state)
    paths = {path: "/".join(map(str, path)) for path, _ in nnx.traversals.flatten_mapping(pure).items()}
    flat = {paths[path]: leaf for path, leaf in nnx.traversals.flatten_mapping(pure).items()}

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        given = tree.flatten(params)
        nested = nnx.traversals.unflatten_mapping({path: given[name] for path, name in paths.items()})
        own = nnx.merge(graph, state, rest, copy=True)
        fresh = nnx.state(own, nnx.Param)
        nnx.replace_by_pure_dict(fresh, nested)
        nnx.update(own, fresh)
        return own(*args, **kwargs)

    return apply, tree.unflatten(flat)


def _unpacked(params: Params) -> Params:
    return tree.map_with_path(lambda _, leaf: quant.unpacked(leaf), params)


def _formed_sizes(params: Params) -> set[int]:
    """How many elements the leaves have that `merge` and unpacking form."""
    flat = tree.flatten(params)
    adapted = {path.rpartition("/")[0] for path in flat if path.endswith("/lora_a")}
    return {
        leaf.size
        for path, leaf in flat.items()
        if quant.is_packed(leaf) or (path.rpartition("/")[0] in adapted and path.rpartition("/")[2] in MAIN)
    }


def _keep_all_but(sizes: set[int]) -> Callable[..., bool]:
    """A checkpoint policy that keeps every value but those of so many elements.

    A name on the sums would not do: their unnamed summands would be kept in their place. An activation that happens to
    be as large is computed again too, which costs time and no correctness.
    """

    def keep(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
        if "call_jaxpr" in parameters:  # a function with a derivative of its own
            outputs = parameters["call_jaxpr"].out_avals
        else:
            outputs, _ = primitive.abstract_eval(*inputs, **parameters)
            outputs = outputs if primitive.multiple_results else [outputs]
        return not any(math.prod(getattr(output, "shape", ())) in sizes for output in outputs)

    return keep
