"""A bias of the update itself (PEFT's `lora_bias`)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.lora.kinds.banked import chosen, is_chosen
from jlora.lora.kinds.kind import SCALE, Call, Kind, Leaf, Output, Start, over, row
from jlora.types import Params

LEAF = Leaf(
    "lora_bias",
    trained=True,
    axes=("outputs",),
    like_b=True,
    absent="module",
    peft="lora_B.bias",
    decays=False,
    scaled=True,
)


class AddedBias(Kind):
    """The update adds scale · lora_bias to a linear's outputs."""

    leaves = (LEAF,)
    title = "the adapter's bias"
    peft_type = "LORA"
    peft_field = "lora_bias"
    additive = True

    def start(self, start: Start) -> dict[str, jax.Array]:
        found = {}
        for target in start.targets:
            target.require_linear(self.peft_field)
            shape = (*target.site.stack_shape, *target.site.factor_shapes[1])
            found[f"{target.path}/{LEAF.name}"] = jnp.zeros(shape, jnp.float32)
        return found

    def changes(self, module: Mapping[str, Any]) -> set[str]:
        return {"bias"} if LEAF.name in module else set()

    def output(self, output: Output, call: Call) -> Output:
        module, ndim = call.module, call.x.ndim
        if LEAF.name not in module:
            return output
        if is_chosen(module):
            ids, scale = chosen(module)
            of_rows = jnp.einsum("bk,bkn->bn", scale, module[LEAF.name][ids])
            return output.plus(of_rows.reshape(len(of_rows), *(1,) * (ndim - 2), -1))
        return output.plus(row(module[LEAF.name] * module[SCALE.name], ndim))

    def merged(self, value: jax.Array, name: str, module: Params) -> jax.Array:
        if name != "bias" or LEAF.name not in module:
            return value
        bias = module[LEAF.name]
        return value.astype(jnp.float32) + bias * over(module[SCALE.name], bias.ndim)


BIAS = AddedBias()


def with_bias(module: Params) -> Params:
    """The module, with a bias of zeros if only its adapter has one."""
    if LEAF.name not in module or "bias" in module:
        return module
    return module | {"bias": jnp.zeros(module[LEAF.name].shape, module["kernel"].dtype)}
