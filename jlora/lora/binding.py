"""Adapters for models that know nothing about them: any Flax model's function, run on a tree of merged leaves."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jlora import quant, tree
from jlora.lora.kinds import changed_leaves
from jlora.lora.merging import merge
from jlora.types import Params


def bind(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The function apply(params, …) for params with adapters and packed leaves.

    `apply` gets the base tree with every adapter added and every packed leaf unpacked, inside whatever jit the function
    is called in.

    The sums are recomputed in the backward pass and never stored, so memory holds the base and what `apply` itself
    saves. jlora's own models do not need this: they compute the update beside the base product, which is cheaper.
    """

    def adapted(params: Params, *args: Any, **kwargs: Any) -> Any:
        def call(params: Params) -> Any:
            return apply(merge(_unpacked(params)), *args, **kwargs)

        return jax.checkpoint(call, policy=_keep_all_but(_formed_sizes(params)))(params)

    return adapted


def from_nnx(model: nnx.Module) -> tuple[Callable[..., Any], Params]:
    """(apply, params) of an NNX model: the model as a function of a nested dict of parameters, and that dict.

    apply(params, *args) calls the model with these parameters. Its other state (batch statistics, random keys) stays
    as it was when `from_nnx` was called; changes to it are dropped. Lists of modules become dicts of "0", "1", ….
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
    """The sizes, in elements, of the leaves that `merge` and unpacking form."""
    flat, changed = tree.flatten(params), set()

    def note(path: str, module: Params) -> Params:
        changed.update(f"{path}/{name}" for name in changed_leaves(module))
        return module

    tree.map_modules(note, params)
    return {leaf.size for path, leaf in flat.items() if quant.is_packed(leaf) or path in changed}


def _keep_all_but(sizes: set[int]) -> Callable[..., bool]:
    """A checkpoint policy that saves every value except those with one of these numbers of elements.

    Naming the sums would not do: their unnamed summands would be saved instead. An activation that happens to have the
    same size is recomputed too, which costs time but stays correct.
    """

    def keep(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
        if "call_jaxpr" in parameters:  # a function with a derivative of its own
            outputs = parameters["call_jaxpr"].out_avals
        else:
            outputs, _ = primitive.abstract_eval(*inputs, **parameters)
            outputs = outputs if primitive.multiple_results else [outputs]
        return not any(math.prod(getattr(output, "shape", ())) in sizes for output in outputs)

    return keep
