"""What a layer of a forward pass needs to know besides its inputs and its weights."""

import dataclasses

import jax

from jlora.kernels.attention import Marks
from jlora.kernels.recurrence import Runs

Shared = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Context:
    """The positions, masks and places of one layer in a forward pass.

    Attributes:
        cos, sin: RoPE tables [B, T, F]; None if nothing is rotated.
        marks: which keys a query may see.
        layer: int32, the layer's number, from 0.
        slot: int32, the layer's number among those that share its stack in the cache.
        runs: which token precedes which, for recurrences; None if no layer is one.
        own_input: what this layer reads of every token besides the layer before [B, T, P]; None: nothing.
        shared: keys and values [B, S, K, F] of earlier layers that later ones use, by name.
    """

    cos: jax.Array | None
    sin: jax.Array | None
    marks: Marks
    layer: jax.Array
    slot: jax.Array
    runs: Runs | None = None
    own_input: jax.Array | None = None
    shared: Shared = dataclasses.field(default_factory=dict)
