"""Baking adapters into their kernels."""

import jax
import jax.numpy as jnp

from jlora import quant, tree
from jlora.lora.partition import is_adapter
from jlora.types import Params


def merge(params: Params) -> Params:
    """The base tree with every adapter added to its kernel: kernel + scale · lora_a @ lora_b, in float32, rounded once.

    A packed kernel comes back dense, in the dtype it dequantises to: packing the sum again would erase small updates.
    Trees that hold no adapter come back as they are.
    """
    return tree.map_modules(_merge_module, params)


def _merge_module(path: str, module: Params) -> Params:
    if "lora_a" not in module:
        return module
    base = {name: leaf for name, leaf in module.items() if not is_adapter(name)}
    return base | {"kernel": merged_kernel(module)}


def merged_kernel(module: Params) -> jax.Array:
    """kernel + scale · lora_a @ lora_b of one module, stacked or not, in the kernel's dtype."""
    kernel = module["kernel"]
    dense = quant.dequantize(kernel) if quant.is_packed(kernel) else kernel
    scale = module["lora_scale"]
    scale = scale.reshape(scale.shape + (1,) * (kernel.ndim - scale.ndim))
    delta = jnp.matmul(module["lora_a"], module["lora_b"], precision="highest") * scale
    return (dense.astype(jnp.float32) + delta).astype(dense.dtype)
