"""The rotations, masks and windows of a forward pass, computed once for all of its layers, which choose by number."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.kernels.attention import Marks
from jlora.kernels.recurrence import Runs, last_segment
from jlora.models.cache import Cache
from jlora.models.config import ModelConfig
from jlora.models.context import Context, Shared
from jlora.models.mixers import MIXERS
from jlora.models.rope import LENGTH_DEPENDENT, rope_tables
from jlora.types import BRANCH


def tables_of(
    config: ModelConfig, positions: jax.Array, segment_ids: jax.Array, cache: Cache | None, branches: bool = True
) -> "tuple[Tables, Cache | None]":
    """(the tables for these tokens, the cache with their positions and segments marked in it).

    Args:
        branches: as in `Model.hidden`.
    """
    key_positions, key_segments, runs = positions, segment_ids, None
    if any(MIXERS[layer.mixer].recurrent for layer in config.layers):
        previous = None if cache is None else last_segment(cache.segment_ids)
        runs = Runs.of(segment_ids, previous, branches)
    if cache is not None:
        cache = cache.mark(positions, segment_ids)
        key_positions, key_segments = cache.positions, cache.segment_ids
    windows = tuple(dict.fromkeys(layer.window for layer in config.layers))
    seen = Marks(positions, segment_ids, key_positions, key_segments, windows=windows, branches=branches)
    lengths = None
    if any(rope.rope_type in LENGTH_DEPENDENT for rope in config.ropes):
        # Tokens that branches share are rotated for the longest branch.
        same = segment_ids[:, :, None] % BRANCH == key_segments[:, None, :] % BRANCH
        lengths = jnp.max(jnp.where(same, key_positions[:, None, :], 0), axis=-1) + 1
    return Tables(tuple(rope_tables(rope, positions, lengths) for rope in config.ropes), seen, runs), cache


class Tables(NamedTuple):
    """All rotations, of which each layer takes one or none, and the marks that tell which keys a query may see.

    Attributes:
        rotations: (cos, sin) [B, T, F] of each of the config's ropes.
        runs: which token precedes which; None if no layer is a recurrence.
    """

    rotations: tuple[tuple[jax.Array, jax.Array], ...]
    marks: Marks
    runs: Runs | None

    def of_layers(self, config: ModelConfig, layers: range) -> tuple["Choices", "Numbers"]:
        """(what the layers of one stack choose from, the numbers of every layer)."""
        chosen, slots = [config.layers[i] for i in layers], config.slots
        choices = self._of_stack([layer.rope for layer in chosen], [layer.window for layer in chosen])
        numbers = (
            layers,
            [slots[i] for i in layers],
            [choices.ropes.index(layer.rope) for layer in chosen],
            [choices.marks.windows.index(layer.window) for layer in chosen],
        )
        return choices, Numbers(*(jnp.asarray(np.array(values, np.int32)) for values in numbers))

    def _of_stack(self, ropes: Sequence[int | None], windows: Sequence[int | None]) -> "Choices":
        """The rotations and windows that the layers of one stack choose from.

        Args:
            ropes, windows: those of each layer.
        """
        used = tuple(dict.fromkeys(ropes))
        found = [None if rope is None else self.rotations[rope] for rope in used]
        some = next((rotation for rotation in found if rotation is not None), None)
        if some is None:
            return Choices(None, None, self.marks.among(windows), used, self.runs)
        cos, sin = some
        identity = jnp.ones_like(cos), jnp.zeros_like(sin)
        cos, sin = (jnp.stack(parts) for parts in zip(*(rotation or identity for rotation in found), strict=True))
        return Choices(cos, sin, self.marks.among(windows), used, self.runs)


class Choices(NamedTuple):
    """What the layers of one stack choose from, by number.

    Attributes:
        cos, sin: [rotations, B, T, F]; None if no layer of the stack rotates.
        marks: with the windows of the stack.
        ropes: the indices in `ModelConfig.ropes` of the rotations; None is the identity.
        runs: as in `Tables`.
    """

    cos: jax.Array | None
    sin: jax.Array | None
    marks: Marks
    ropes: tuple[int | None, ...]
    runs: Runs | None

    def of_layer(self, numbers: "Numbers", own_input: jax.Array | None, shared: Shared) -> Context:
        """The Context of one layer; the last two arguments are those of `Context`."""

        def pick(stack: jax.Array | None) -> jax.Array | None:
            if stack is None or len(stack) == 1:
                return None if stack is None else stack[0]
            return jax.lax.dynamic_index_in_dim(stack, numbers.rotation, keepdims=False)

        marks = self.marks.of_layer(numbers.window)
        return Context(pick(self.cos), pick(self.sin), marks, numbers.layer, numbers.slot, self.runs, own_input, shared)


class Numbers(NamedTuple):
    """Numbers of a layer, or of all layers of a stack: its own, and those of what it chooses."""

    layer: jax.Array
    slot: jax.Array
    rotation: jax.Array
    window: jax.Array
