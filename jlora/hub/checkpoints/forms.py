"""The form that each leaf of each layer is kept in, and the layers that can be stacked because their forms agree."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jlora import tree
from jlora.errors import UserError, describe_faults
from jlora.hub.checkpoints.names import HubTensor
from jlora.hub.checkpoints.stored import Stored
from jlora.quant import QuantConfig, leaf_format


class Form(NamedTuple):
    """How a leaf is kept.

    Attributes:
        format: the format it is packed in; None if it is not packed.
        dtype: the array's dtype, or the dequantised values'.
        merge_aware: whether the leaf is packed only when it is used.
    """

    format: str | None
    double_quant: bool
    dtype: np.dtype
    merge_aware: bool = False


# (leaf's path without the numbers of its stack's layers, layer (None outside of stacks)) → form.
Forms = dict[tuple[str, int | None], Form]


def chosen_forms(leaves: Mapping[str, jax.ShapeDtypeStruct], config: QuantConfig | None, dtype: np.dtype) -> Forms:
    """The forms that a QuantConfig chooses."""
    double_quant, merge_aware = (config.double_quant, config.merge_aware) if config else (False, False)
    return {
        (canonical, layer): Form(leaf_format(path, config, layer), double_quant, dtype, merge_aware)
        for path, leaf in leaves.items()
        for canonical, layer in _layers(path, leaf.shape[0])
    }


def stored_forms(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, Sequence[HubTensor]],
    stored: Mapping[str, Stored],
    dtype: np.dtype,
) -> Forms:
    """The forms that a checkpoint's packed tensors already have.

    Raises:
        ValueError: packed tensors are not whole kernels, or experts of one layer differ in form; all are listed.
    """
    forms: Forms = {}
    problems: list[str] = []
    for path, leaf in leaves.items():
        keys = _layers(path, leaf.shape[0])
        for tensor in tensors[path]:
            form = Form(None, False, dtype)
            if packed := stored.get(tensor.name):
                form = Form(packed.format, packed.offset is not None, packed.dtype or dtype)
                if not path.endswith("/kernel") or tensor.columns not in (None, (0, leaf.shape[-1])):
                    problems.append(
                        f"{tensor.name} is packed ({packed.format}); jlora packs whole kernels of linears only"
                    )
            key = keys[tensor.index[0] if tensor.index else 0]
            if forms.setdefault(key, form) != form:
                problems.append(f"{tensor.name} is {form.format or 'not packed'}, others of its layer are not")
    if problems:
        raise UserError("packed tensors do not fit the model:\n  " + "\n  ".join(problems))
    return forms


def laid_over(chosen: Forms, packed: Forms) -> Forms:
    """The forms of `packed` for what is packed there, and those of `chosen` for the rest.

    Raises:
        UserError: by `chosen`, something that is packed there would be packed with its update; all is listed.
    """
    over = {key: form for key, form in packed.items() if form.format}
    if clash := sorted({key[0] for key in over if chosen[key].format and chosen[key].merge_aware}):
        title = "merge_aware packs values with their update, and these are packed already: give the original checkpoint"
        raise UserError(describe_faults(f"{title}, or leave them out by rules with None", clash))
    return chosen | over


def form_of(forms: Forms, path: str) -> Form:
    """The form of the leaf at `path`, which is the same in all its layers."""
    stack = tree.stack_of(path)
    if stack is None:
        return forms[path, None]
    return forms[f"{stack.name}/{stack.rest}", stack.layers[0] if stack.layers else 0]


def stack_layers(forms: Forms, structures: Sequence[Hashable]) -> tuple[range, ...]:
    """The layers of each stack, which agree in structure and in the form of every leaf.

    Args:
        structures: each layer's.
    """
    signatures: list[dict[str, Form]] = [{} for _ in structures]
    for (path, layer), form in forms.items():
        if layer is not None:
            signatures[layer][path] = form
    found = (tuple(sorted(signature.items(), key=str)) for signature in signatures)
    return tuple(tree.stack_ranges(list(zip(structures, found, strict=True))))


def _layers(path: str, count: int) -> list[tuple[str, int | None]]:
    stack = tree.stack_of(path)
    if stack is None:
        return [(path, None)]
    return [(f"{stack.name}/{stack.rest}", layer) for layer in stack.indices(count)]
