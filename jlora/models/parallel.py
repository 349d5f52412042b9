"""Attention and a Mamba-2 mixer in one layer, which read the same inputs and whose outputs are added (Falcon-H1)."""

import flax.linen as nn
import jax

from jlora.families.family import Layer
from jlora.kernels.attention import AUTO
from jlora.models import attention, mamba
from jlora.models.cache import Cache, Room
from jlora.models.config import ModelConfig
from jlora.models.context import Context
from jlora.models.layers import scaled


def room(config: ModelConfig, layer: Layer) -> Room:
    """What a layer keeps of earlier tokens: keys and values, and what the mixer keeps."""
    return {**attention.room(config, layer), **mamba.room(config, layer)}


def products(config: ModelConfig, layer: Layer, tokens: int) -> int:
    """Those of both."""
    return attention.products(config, layer, tokens) + mamba.products(config, layer, tokens)


class Parallel(nn.Module):
    """attention(x) + mamba(x), each with factors of its own; the two are modules of the layer."""

    config: ModelConfig
    layer: Layer = Layer()
    form: str = AUTO

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        names, scales = self.config.names, self.config.scales
        attends = attention.Attention(self.config, self.layer, self.form, name=names.attention)
        recurs = mamba.Mamba(self.config, self.layer, self.form, name=names.mixer("mamba"))
        y, cache = attends(scaled(x, scales.attention_in), context, cache)
        z, cache = recurs(x, context, cache)
        return scaled(y, scales.attention_out) + z, cache
