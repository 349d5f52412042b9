"""DoRA (Liu et al. 2024): the length of every output's weights is trained too."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora import quant
from jlora.lora.kinds.kind import RANK, Call, Kind, Leaf, Output, Start, row
from jlora.lora.kinds.product import PRODUCT
from jlora.types import Params

MAGNITUDE = Leaf(
    "lora_magnitude",
    trained=True,
    axes=("outputs",),
    like_b=True,
    peft="lora_magnitude_vector",
)
BASE_NORM = Leaf("lora_base_norm", axes=("outputs",))


class DoRA(Kind):
    """The sum of kernel and update is rescaled so that every output's weights have the length `lora_magnitude`."""

    leaves = (MAGNITUDE, BASE_NORM)
    title = "DoRA's magnitudes"
    peft_type = "LORA"
    peft_field = "use_dora"

    def start(self, start: Start) -> dict[str, jax.Array]:
        found = {}
        for target in start.targets:
            target.require_linear(self.peft_field)
            module = {"kernel": start.leaves[f"{target.path}/kernel"]}
            module |= {leaf.name: start.leaves.get(f"{target.path}/{leaf.name}") for leaf in PRODUCT.leaves}
            module = {name: leaf for name, leaf in module.items() if leaf is not None}
            norms = base_norms(module["kernel"])
            found[f"{target.path}/{BASE_NORM.name}"] = norms
            found[f"{target.path}/{MAGNITUDE.name}"] = column_norms(module | {BASE_NORM.name: norms})
        return found

    def changes(self, module: Mapping[str, Any]) -> set[str]:
        return {"kernel"} if MAGNITUDE.name in module else set()

    def output(self, output: Output, call: Call) -> Output:
        """gain · (base + update); with dropout the base is rescaled only for what is kept, as in PEFT."""
        if MAGNITUDE.name not in call.module:
            return output
        base = output.base.astype(jnp.float32)
        gain = row(gains(call.module), base.ndim)
        kept = base
        if call.drops:
            kept = call.matmul(call.dropped, call.module["kernel"]).astype(jnp.float32)
        return Output(base + (gain - 1) * kept, gain * output.update.astype(jnp.float32))

    def merged(self, value: jax.Array, name: str, module: Params) -> jax.Array:
        return value * gains(module)[..., None, :] if name in self.changes(module) else value


DORA = DoRA()


def column_norms(module: Params) -> Float[Array, "*stack N"]:
    """‖kernel + scale · lora_a @ lora_b‖ of every output, float32, without forming the sum.

    By ‖W + s·AB‖² = ‖W‖² + 2s⟨W, AB⟩ + s²‖AB‖², whose first term is frozen: O(D·N·R).
    """
    lora_a, lora_b, scale = PRODUCT.factors(module)
    scale = scale.reshape(scale.shape + (1,) * (lora_b.ndim - scale.ndim)) * jnp.ones_like(lora_b[..., :1, :1])
    kernel = quant.unpacked(module["kernel"])
    crossed = jnp.swapaxes(lora_a, -1, -2) @ kernel.astype(jnp.float32)
    gram = jnp.swapaxes(lora_a, -1, -2) @ lora_a
    squares = 2 * scale * crossed * lora_b + scale**2 * (gram @ lora_b) * lora_b
    return jnp.sqrt(jnp.maximum(module[BASE_NORM.name] ** 2 + jnp.sum(squares, axis=-2), 0))


def base_norms(kernel: Any) -> Float[Array, "*stack N"]:
    """‖kernel‖ of every output, float32."""
    return jnp.sqrt(jnp.sum(quant.unpacked(kernel).astype(jnp.float32) ** 2, axis=-2))


def gains(module: Params) -> Float[Array, "*stack N"]:
    """DoRA's factor for every output: its magnitude over its current length, which no gradient flows through."""
    factor = module[MAGNITUDE.name] / jax.lax.stop_gradient(column_norms(module))
    if RANK.name in module:  # layers of a stack that are not adapted
        factor = jnp.where(module[RANK.name][..., None] > 0, factor, 1)
    return factor
