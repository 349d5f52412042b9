"""Gated short convolutions (LFM2): a layer that sees only a few tokens back."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.families.family import Layer
from jlora.kernels.attention import AUTO
from jlora.kernels.recurrence import convolve
from jlora.models.cache import Cache, Room, Shape
from jlora.models.config import ModelConfig
from jlora.models.context import Context
from jlora.models.layers import Filter, Linear


def room(config: ModelConfig, layer: Layer) -> Room:
    """What a layer keeps of earlier tokens: the last ones before the convolution."""
    return {"tail": Shape((config.conv_kernel - 1, config.hidden_size))}


def products(config: ModelConfig, layer: Layer, tokens: int) -> int:
    """Products for a token besides those with linears: those of the convolution, which are few, are not counted."""
    return 0


class ShortConv(nn.Module):
    """output(c · convolution(b · x)), where b, c and x are the thirds of one linear's output."""

    config: ModelConfig
    layer: Layer = Layer()
    form: str = AUTO  # of attention, which is not used here

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        config, place = self.config, (self.config.cache_stack(self.layer), context.slot)
        width, bias = config.hidden_size, config.conv_bias
        before, after, inputs = jnp.split(Linear(3 * width, bias, name="in_proj")(x), 3, axis=-1)
        tail = None if cache is None else cache.state(*place)["tail"]
        kernel, offset = Filter(config.conv_kernel, bias, name="conv")(width)
        y, tail = convolve(before * inputs, kernel, context.runs, offset, tail)
        if cache is not None:
            cache = cache.with_state(*place, {"tail": tail})
        (output,) = config.names.mixer_outputs
        return Linear(width, bias, name=output)(after * y), cache
