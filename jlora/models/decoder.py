"""The decoder layer of every family; how families differ is data in the ModelConfig."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora import sharding, tree
from jlora.families.family import Layer
from jlora.kernels.attention import AUTO
from jlora.models.cache import Cache
from jlora.models.config import ModelConfig
from jlora.models.context import Context
from jlora.models.experts import Mixture, mixture_leaves
from jlora.models.layers import ACTIVATIONS, Linear, Norm, Parameter, scaled
from jlora.models.mixers import MIXERS
from jlora.models.mlp import MLP

TILES = (None, sharding.ROWS, sharding.TOKENS, None)  # of an MLP's inputs [count, B, T/count, D]
# The most inner values of an MLP that a tile has on one device.
TILE = 1 << 23


def _tiles(shape: tuple[int, int, int], width: int) -> int:
    """How many tiles of tokens an MLP's inner values [B, T, width] are computed in.

    That is the fewest that keep a tile within TILE and divide a device's tokens.
    """
    rows, tokens, _ = shape
    tokens, rest = divmod(tokens, sharding.ways(sharding.TOKENS))  # a tile has tokens of every device
    if rest:
        return 1
    values = rows * tokens * width // sharding.ways(*sharding.ROWS, sharding.FEATURES)
    needed = max(1, -(-values // TILE))
    return next((tiles for tiles in range(needed, min(tokens, 4 * needed) + 1) if tokens % tiles == 0), 1)


def _cut(x: jax.Array, count: int) -> jax.Array:
    """[B, T, D] in tiles.

    On a mesh they are [count, B, T/count, D], each with as many tokens from every shard; else [count, 1, B·T/count, D]
    in memory order.
    """
    if not sharding.sizes():
        return x.reshape(count, 1, -1, x.shape[-1])
    batch, _, width = x.shape
    tiles = jnp.moveaxis(x.reshape(batch, sharding.ways(sharding.TOKENS), count, -1, width), 2, 0)
    return sharding.constrain(tiles.reshape(count, batch, -1, width), *TILES)


def _joined(tiles: jax.Array) -> jax.Array:
    """[B, T, D] from the tiles of `_cut`; without a mesh the tiles themselves, which have the same memory order."""
    if not sharding.sizes():
        return tiles
    count, batch, _, width = tiles.shape
    tiles = sharding.constrain(tiles, *TILES)
    return jnp.moveaxis(tiles.reshape(count, batch, sharding.ways(sharding.TOKENS), -1, width), 0, 2)


class Feedforward(nn.Module):
    """The half of a layer that works on each token alone: norm, MLP, norm, added to the attention half's output."""

    config: ModelConfig
    layer: Layer = Layer()
    gathered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array | None, attended: jax.Array) -> jax.Array:
        config, norms, name = self.config, self.config.names.mlp_norms, self.config.names.mlp
        width = self.layer.intermediate_size or config.intermediate_size
        beside = config.experts.beside if self.layer.experts else None
        mixes = self.layer.experts and not beside
        mlp = Mixture(config, name=name) if mixes else MLP(config, width, self.gathered, name=name)
        inputs = _norm(config, norms[0], x if config.parallel else attended)
        y = mlp(inputs)
        if beside:
            mixture = Mixture(config, name=beside.module)
            if beside.module is None:
                nn.share_scope(self, mixture)
            read = (_norm(config, beside.before, attended), attended) if beside.before else (inputs,)
            y = _norm(config, beside.dense, y) + _norm(config, beside.after, mixture(*read))
        return attended + scaled(_norm(config, norms[1], y, config.post_norm_eps), config.residual_scale)

    def in_tiles(self, count: int, key: jax.Array | None, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The same, tile by tile of tokens, each recomputed in the backward pass.

        An MLP's inner values take as much memory as several layer inputs.

        Args:
            count: the number of tiles.
            key: the key of dropout, from which each tile gets its own.
        """
        params, own = self.variables["params"], self.config.names.mlp
        mlp = tree.unflatten(sharding.gathered(own, tree.flatten(params[own])))
        others = (*self.config.names.mlp_norms, *(self.config.experts.beside or () if self.layer.experts else ()))
        rest = {name: params[name] for name in others if name in params}
        if self.layer.experts:
            rest |= mixture_leaves(self.config, params)
        variables, alone = (
            {"params": rest | {own: mlp}},
            Feedforward(self.config, self.layer, gathered=True, parent=None),
        )

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def one(number: jax.Array, *tiles: jax.Array | None) -> jax.Array:
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, number)}
            return alone.apply(variables, *tiles, rngs=rngs)

        # If the MLP does not read x, there is no need to cut it and carry it along.
        parts = (_cut(x, count) if self.config.parallel else None), _cut(attended, count)
        _, y = jax.lax.scan(lambda _, item: (None, one(*item)), None, (jnp.arange(count), *parts))
        return _joined(y).reshape(attended.shape)


class Block(nn.Module):
    """One decoder layer: attention and MLP, or only one of them, with norms before, after, or both.

    Attributes:
        attention: the form that computes attention (`jlora.kernels.attention`).
        lean: whether the MLP is computed in tiles, to save memory.
    """

    config: ModelConfig
    layer: Layer = Layer()
    attention: str = AUTO
    lean: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        x = sharding.held(x)
        y, inputs, cache = self._mixed(x, context, cache)
        y = self._fed(inputs if self.config.names.mlp_norms[0] is None else x, y) if self.layer.mlp else y
        return self._scaled(self._with_own_input(y, context.own_input)), cache

    def _mixed(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, jax.Array, Cache | None]:
        """The half of the layer that mixes tokens (norm, mixer, norm, added to its input), and what the mixer reads."""
        config, names, kind = self.config, self.config.names, self.layer.mixer
        if MIXERS[kind].module is None:
            return x, x, cache
        mixer = MIXERS[kind].module(config, self.layer, self.attention, name=names.mixer(kind))
        if names.mixer(kind) is None:
            nn.share_scope(self, mixer)
        inputs = _norm(config, names.attention_norms[0], x)
        y, cache = mixer(inputs, context, cache)
        y = _norm(config, names.attention_norms[1], y, config.post_norm_eps)
        return x + scaled(y, config.residual_scale), inputs, cache

    def _fed(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The other half, at once or in tiles."""
        config = self.config
        feedforward = Feedforward(config, self.layer)
        nn.share_scope(self, feedforward)
        tiles = _tiles(x.shape, self._inner()) if self.lean else 1
        if tiles == 1 or self.is_mutable_collection("inputs"):
            return feedforward(x, attended)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return feedforward.in_tiles(tiles, key, x, attended)

    def _with_own_input(self, y: jax.Array, own: jax.Array | None) -> jax.Array:
        """y + norm(output(act(gate(y)) · own)), if the layer has an input of its own."""
        config, names = self.config, self.config.names.layer_inputs
        if own is None:
            return y
        gate = ACTIVATIONS[config.hidden_act](Linear(config.hidden_size_per_layer_input, name=names.gate)(y))
        return y + _norm(config, names.output_norm, Linear(config.hidden_size, name=names.output)(gate * own))

    def _scaled(self, y: jax.Array) -> jax.Array:
        if not self.config.layer_scalar:
            return y
        return y * Parameter((1,), name="layer_scalar")().astype(y.dtype).reshape((1,) * y.ndim)

    def _inner(self) -> int:
        """The MLP's inner values for a token.

        With experts they are divided by count / top_k: every tile reads the kernels of all experts, so it must hold
        that many times more tokens to be worth it.
        """
        experts = self.config.experts
        if not self.layer.experts or experts is None:
            return self.layer.intermediate_size or self.config.intermediate_size
        if sharding.sizes():  # each device sorts its own tokens, all together
            return 0
        dense = self.layer.intermediate_size or self.config.intermediate_size
        return max(dense if experts.beside else 1, experts.top_k**2 * experts.intermediate_size // experts.count)


def _norm(config: ModelConfig, name: str | None, x: jax.Array, epsilon: float | None = None) -> jax.Array:
    epsilon = config.norm_eps if epsilon is None else epsilon
    return x if name is None else sharding.held(Norm(config.norm, epsilon, name=name)(x))
