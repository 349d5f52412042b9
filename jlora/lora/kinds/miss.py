"""MiSS (Kang and Yin 2024, "Balancing LoRA Performance and Efficiency with Simple Shard Sharing")."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.errors import UserError
from jlora.lora.kinds.kind import SCALE, SETTINGS, Call, Kind, Leaf, Output, Start, over
from jlora.lora.kinds.product import A, B, settings
from jlora.lora.targets import Target
from jlora.types import Params

BLOCK = Leaf("lora_miss_b", trained=True, axes=("shard", "outputs"), absent="module", peft="miss_block", scaled=True)


class MiSS(Kind):
    """The inputs are cut into shards of R values, and all shards share one matrix: the update is sum(shards) @ block.

    This is a product whose A is fixed: input d reads row d modulo R. The scale starts at 1, whatever `lora_alpha` is.
    """

    leaves = (BLOCK, *SETTINGS)
    title = "MiSS's shared block"
    peft_type = "MISS"
    additive = True
    peft_names: ClassVar = {"lora_dropout": "miss_dropout", "init_lora_weights": "init_weights"}
    peft_ignored = ("mini_r",)
    peft_refused: ClassVar = {"init_weights": ("bat", "mini")}

    def wanted(self, config: Any) -> bool:
        return config.peft_type == self.peft_type

    def start(self, start: Start) -> dict[str, jax.Array]:
        if start.config.init_lora_weights not in (True, False):
            raise UserError(
                f"init_lora_weights={start.config.init_lora_weights!r}: expected True (zeros) or False (random) with "
                "peft_type='MISS'"
            )
        return {
            f"{target.path}/{name}": leaf for target in start.targets for name, leaf in _started(target, start).items()
        }

    def changes(self, module: Params) -> set[str]:
        return {"kernel"} if BLOCK.name in module else set()

    def output(self, output: Output, call: Call) -> Output:
        if BLOCK.name not in call.module:
            return output
        block, x = call.module[BLOCK.name], call.dropped
        shard = block.shape[0]
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % shard)])
        summed = padded.reshape(*x.shape[:-1], -1, shard).sum(axis=-2)
        return output.plus(call.matmul(summed * call.module[SCALE.name].astype(x.dtype), block))

    def merged(self, value: jax.Array, name: str, module: Params) -> jax.Array:
        if name not in self.changes(module):
            return value
        block = module[BLOCK.name]
        rows = jnp.arange(value.shape[-2]) % block.shape[-2]
        return value.astype(jnp.float32) + jnp.take(block, rows, axis=-2) * over(module[SCALE.name], value.ndim)

    def as_product(self, module: Params) -> Params:
        """With A written out: zeros and ones. Without the kernel beside it, nothing says how many inputs A has."""
        if BLOCK.name not in module or "kernel" not in module:
            return module
        block, inputs = module[BLOCK.name], module["kernel"].shape[-2]
        lora_a = jax.nn.one_hot(jnp.arange(inputs) % block.shape[-2], block.shape[-2])
        kept = {name: leaf for name, leaf in module.items() if name != BLOCK.name}
        return kept | {A.name: jnp.broadcast_to(lora_a, (*block.shape[:-2], *lora_a.shape)), B.name: block}


MISS = MiSS()


def _started(target: Target, start: Start) -> dict[str, jax.Array]:
    """The leaves of one module. As in PEFT, the block starts at zero, or uniform in ±1/sqrt(outputs)."""
    target.require_linear("peft_type='MISS'")
    site, rank = target.site, max(target.ranks)
    if others := sorted(set(target.ranks) - {0, rank}):
        raise UserError(f"{target.path}: MiSS has one rank for all layers of a stack, found {[*others, rank]}")
    if rank > site.inputs:
        raise UserError(f"{target.path}: rank {rank} is more than its {site.inputs} inputs, which are cut into shards")
    shape, bound = (*site.stack_shape, rank, site.outputs), 1 / math.sqrt(site.outputs)
    block = jnp.zeros(shape, jnp.float32)
    if not start.config.init_lora_weights:
        block = jax.random.uniform(start.key_of(target.path), shape, jnp.float32, -bound, bound)
    adapted = jnp.asarray(target.rank_array > 0)
    found = settings(target, start) | {SCALE.name: adapted.astype(jnp.float32)}
    return {BLOCK.name: block * over(adapted, block.ndim)} | found
