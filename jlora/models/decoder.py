"""The decoder layer of every family; how families differ is data in the ModelConfig."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora import sharding
from jlora.kernels.attention import AUTO, TOKENS_SPLIT, Marks, attend
from jlora.kernels.order import in_turn
from jlora.models.cache import Cache
from jlora.models.config import ModelConfig
from jlora.models.experts import Mixture
from jlora.models.layers import ACTIVATIONS, Linear, Norm
from jlora.models.rope import rotate

# The mesh axes of keys and values [B, T, K, F] that go to a cache, of which a device has all tokens. If `tensor` does
# not divide the key heads, every device has all of them.
CACHED = (sharding.ROWS, None, sharding.FEATURES, None)
TILES = (None, sharding.ROWS, sharding.TOKENS, None)  # of an MLP's inputs [count, B, T/count, D]
# The most inner values of an MLP that a tile has on one device.
TILE = 1 << 23


@dataclasses.dataclass(frozen=True)
class Context:
    """The positions and masks of one layer in a forward pass.

    Attributes:
        cos, sin: RoPE tables [B, T, F]; None if nothing is rotated.
        marks: which keys a query may see.
    """

    cos: jax.Array | None
    sin: jax.Array | None
    marks: Marks


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


class Attention(nn.Module):
    """Self-attention; with a cache, it writes the layer's T new keys and values and attends to all S."""

    config: ModelConfig
    form: str = AUTO

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        config, (batch, tokens, _) = self.config, x.shape
        queries, keys, values = self._project(x, TOKENS_SPLIT if cache is None else CACHED)
        if context.cos is not None:
            queries, keys = (rotate(heads, context.cos, context.sin) for heads in (queries, keys))
        if config.inverse_layer_scale:
            queries = queries / (layer + 1).astype(queries.dtype)
        if cache is not None:
            cache, keys, values = cache.write(layer, keys, values)
        settings = config.attention_scale, config.attention_softcap, self.form
        y = attend(queries, keys, values, context.marks, *settings)
        y = y.reshape(batch, tokens, -1)
        return Linear(config.hidden_size, config.output_bias, name=config.names.output)(y), cache

    def _project(self, x: jax.Array, axes: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, F], keys and values [B, T, K, F] on these mesh axes, normalised if the family does that."""
        config, names = self.config, self.config.names.queries_keys_values
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        widths = [count * config.head_dim for count in heads]
        if len(names) == 3:
            parts = [Linear(width, config.qkv_bias, name=name)(x) for name, width in zip(names, widths, strict=True)]
        else:
            parts = self._split(Linear(sum(widths), config.qkv_bias, name=names[0])(x), widths)
        if config.qk_norm == "all":
            parts = [self._norm("q_norm", parts[0]), self._norm("k_norm", parts[1]), parts[2]]
        queries, keys, values = (
            sharding.constrain(part.reshape(*x.shape[:2], count, config.head_dim), *axes)
            for part, count, axes in zip(parts, heads, (TOKENS_SPLIT, axes, axes), strict=True)
        )
        if config.qk_norm == "head":
            queries, keys = self._norm("q_norm", queries), self._norm("k_norm", keys)
        return queries, keys, values

    def _split(self, fused: jax.Array, widths: list[int]) -> list[jax.Array]:
        if not self.config.qkv_by_head:
            return jnp.split(fused, [widths[0], widths[0] + widths[1]], axis=-1)
        by_head = fused.reshape(*fused.shape[:-1], self.config.num_attention_heads, -1)
        return [part.reshape(*fused.shape[:-1], -1) for part in jnp.split(by_head, 3, axis=-1)]

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return Norm(self.config.norm, self.config.norm_eps, name=name)(x)


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)), with gate and up separate or in one product, or down(act(up(x)))."""

    config: ModelConfig
    gathered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, names = self.config, self.config.names
        width = config.intermediate_size * (2 if config.gated else 1) // len(names.mlp_up)
        parts = []
        for name in names.mlp_up:
            # In sequence, in both passes, so that only one of the two kernels is dequantised at a time.
            y, x = in_turn(Linear(width, config.mlp_bias, self.gathered, name=name)(x), x)
            parts.append(y)
        if config.gated and len(parts) == 1:
            parts = jnp.split(parts[0], 2, axis=-1)
        y = ACTIVATIONS[config.hidden_act](parts[0])
        y = y * parts[1] if config.gated else y
        return Linear(config.hidden_size, config.mlp_bias, self.gathered, name=names.mlp_down)(y)


class Feedforward(nn.Module):
    """The half of a layer that works on each token alone: norm, MLP, norm, added to the attention half's output."""

    config: ModelConfig
    experts: bool = False
    gathered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array | None, attended: jax.Array) -> jax.Array:
        config, norms = self.config, self.config.names.mlp_norms
        mlp = Mixture(config, name="mlp") if self.experts else MLP(config, self.gathered, name="mlp")
        y = mlp(_norm(config, norms[0], x if config.parallel else attended))
        return attended + _scaled(config, _norm(config, norms[1], y))

    def in_tiles(self, count: int, key: jax.Array | None, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The same, tile by tile of tokens, each recomputed in the backward pass.

        An MLP's inner values take as much memory as several layer inputs.

        Args:
            count: the number of tiles.
            key: the key of dropout, from which each tile gets its own.
        """
        params = self.variables["params"]
        mlp = {name: sharding.gathered(f"mlp/{name}", linear) for name, linear in params["mlp"].items()}
        norms = {name: params[name] for name in self.config.names.mlp_norms if name is not None}
        variables, alone = (
            {"params": norms | {"mlp": mlp}},
            Feedforward(self.config, self.experts, gathered=True, parent=None),
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
    """One decoder layer: attention and MLP, with norms before, after, or both.

    Attributes:
        attention: the form that computes attention (`jlora.kernels.attention`).
        lean: whether the MLP is computed in tiles, to save memory.
    """

    config: ModelConfig
    experts: bool = False
    attention: str = AUTO
    lean: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        config, names = self.config, self.config.names
        x = sharding.held(x)
        attention = Attention(config, self.attention, name=names.attention)
        y, cache = attention(_norm(config, names.attention_norms[0], x), context, cache, layer)
        attended = x + _scaled(config, _norm(config, names.attention_norms[1], y))
        feedforward = Feedforward(config, self.experts)
        nn.share_scope(self, feedforward)
        tiles = _tiles(x.shape, self._inner()) if self.lean else 1
        if tiles == 1 or self.is_mutable_collection("inputs"):
            return feedforward(x, attended), cache
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return feedforward.in_tiles(tiles, key, x, attended), cache

    def _inner(self) -> int:
        """The MLP's inner values for a token.

        With experts they are divided by count / top_k: every tile reads the kernels of all experts, so it must hold
        that many times more tokens to be worth it.
        """
        experts = self.config.experts
        if not self.experts or experts is None:
            return self.config.intermediate_size
        if sharding.sizes():  # each device sorts its own tokens, all together
            return 0
        return max(1, experts.top_k**2 * experts.intermediate_size // experts.count)


def _norm(config: ModelConfig, name: str | None, x: jax.Array) -> jax.Array:
    return x if name is None else sharding.held(Norm(config.norm, config.norm_eps, name=name)(x))


def _scaled(config: ModelConfig, y: jax.Array) -> jax.Array:
    scale = config.residual_scale
    return y if scale == 1 else y * jnp.asarray(scale, y.dtype)
