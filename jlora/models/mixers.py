"""What mixes tokens in a layer: a table of the modules, and of what each keeps of earlier tokens."""

from collections.abc import Callable
from typing import NamedTuple

from jlora.families.family import Layer
from jlora.models import attention, delta, latent, mamba, parallel, shortconv
from jlora.models.cache import Room
from jlora.models.config import ModelConfig


class Mixer(NamedTuple):
    """One way to mix tokens.

    Attributes:
        module: (config, layer, the form of attention) → a Flax module that maps (x [B, T, D], context, cache or None)
            to (y [B, T, D], the cache with these tokens); None: the layer mixes no tokens.
        room: (config, layer) → what a layer keeps of a row's earlier tokens.
        products: (config, layer, length of a row) → the products for a token besides those with linears' weights.
        recurrent: whether it needs `Context.runs`.
        attends: whether its heads are those of `ModelConfig.heads`, with `jlora.kernels.attention`.
    """

    module: Callable | None
    room: Callable[[ModelConfig, Layer], Room]
    products: Callable[[ModelConfig, Layer, int], int]
    recurrent: bool = False
    attends: bool = False


# `jlora.families.family.Layer.mixer` → the mixer.
MIXERS = {
    "attention": Mixer(attention.Attention, attention.room, attention.products, attends=True),
    "delta": Mixer(delta.DeltaNet, delta.room, delta.products, recurrent=True),
    "conv": Mixer(shortconv.ShortConv, shortconv.room, shortconv.products, recurrent=True),
    "latent": Mixer(latent.LatentAttention, latent.room, latent.products),
    "none": Mixer(None, lambda config, layer: {}, lambda config, layer, tokens: 0),
    "mamba": Mixer(mamba.Mamba, mamba.room, mamba.products, recurrent=True),
    "parallel": Mixer(parallel.Parallel, parallel.room, parallel.products, recurrent=True, attends=True),
}
