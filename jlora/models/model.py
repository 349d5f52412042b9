"""A decoder as pure functions over its param tree: embed, scan over the stacked layers, norm, head."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jlora import lora, sharding, tree
from jlora.errors import UserError, first_few
from jlora.families.family import SCORE, Layer
from jlora.kernels.attention import AUTO
from jlora.lora.kinds.copies import copy_of
from jlora.models.attention import KEPT
from jlora.models.cache import Cache, Room
from jlora.models.config import ModelConfig
from jlora.models.context import Shared
from jlora.models.decoder import Block
from jlora.models.layers import Embed, Linear, Norm
from jlora.models.mixers import MIXERS
from jlora.models.remat import LAYER_INPUT, is_lean, rematerialised
from jlora.models.tables import Choices, Numbers, Tables, tables_of
from jlora.types import Params


class Inputs(NamedTuple):
    """What goes into the layers.

    Attributes:
        x: [B, T, D], the embeddings.
        own: [L, B, T, P], what each layer reads besides the layer before; None: nothing.
    """

    x: jax.Array
    own: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Model:
    """An architecture without weights: every method takes the params. Hashable, so it can be static in jit.

    Attributes:
        attention: the form that computes attention, one of `jlora.kernels.attention.FORMS`, or "auto".
    """

    config: ModelConfig
    attention: str = AUTO

    def __call__(
        self,
        params: Params,
        tokens: Int[Array | np.ndarray, "B T"],
        positions: Int[Array | np.ndarray, "B T"] | None = None,
        segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits of every next token.

        Args:
            positions: default 0, 1, 2, …; within a segment they must rise with the index, or keys are missed.
            segment_ids: tokens see only their own segment and the one it branches off (`jlora.types.BRANCH`); default
                one segment. 0 is padding by convention.

        Raises:
            UserError: the embedding has no row for a token. Only tokens in a NumPy array are checked; on a device such
                tokens give NaN logits.
        """
        if isinstance(tokens, np.ndarray):  # checking tokens on a device would wait for it
            self.require_rows([tokens])
        return self._call(params, tokens, positions, segment_ids)

    @functools.partial(sharding.jit, static_argnums=0)
    def _call(
        self, params: Params, tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None
    ) -> jax.Array:
        hidden, _ = self.hidden(params, tokens, positions, segment_ids)
        return self.logits(params, hidden)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        cache: Cache | None = None,
        key: jax.Array | None = None,
        remat: bool | str = False,
        branches: bool = True,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """(the final norm's output, the cache with these tokens added, or None if none is given).

        Args:
            positions, segment_ids: as in `__call__`.
            cache: keys and values of earlier tokens, which these tokens see too.
            key: turns on dropout.
            remat: what the backward pass recomputes, one of `jlora.models.remat.POLICIES`; True is "full", which saves
                only each layer's input and recomputes the rest.
            branches: whether a segment may branch off another (`jlora.types.BRANCH`), or a position may not follow the
                one before it in its segment; if not, faster forms of attention can be used.
        """
        branches = branches and not (segment_ids is None and positions is None)
        positions, segment_ids = self._defaults(tokens, positions, segment_ids)
        config = self.config
        tables, cache = tables_of(config, positions, segment_ids, cache, branches)
        inputs = self._inputs(params, tokens, positions, key)
        x, cache, _ = self._layers(params, inputs, tables, cache, key, remat)
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + tokens.shape[1])
        norm = tree.subtree(params, config.names.norm) if config.names.norm else {}
        return Norm(config.final_norm or config.norm, config.norm_eps).apply({"params": norm}, x), cache

    @functools.partial(sharding.jit, static_argnums=0)
    def input_moments(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Params:
        """Moments of the inputs of every linear in the stack, float32.

        At each linear's path: "count" [L], "sum" [L, D] and "gram" [L, D, D]. They are sums over tokens, so those of
        several batches can be added; padding (segment 0) does not count.
        """
        positions, segment_ids = self._defaults(tokens, positions, segment_ids)
        weights = (segment_ids != 0).astype(jnp.float32)

        def moments(x: jax.Array) -> dict[str, jax.Array]:
            rows = (x.astype(jnp.float32) * weights[..., None]).reshape(-1, x.shape[-1])
            return {"count": jnp.sum(weights), "sum": jnp.sum(rows, axis=0), "gram": rows.T @ rows}

        tables, _ = tables_of(self.config, positions, segment_ids, None)
        inputs = self._inputs(params, tokens, positions)
        _, _, seen = self._layers(params, inputs, tables, None, None, True, moments)
        return seen

    def head(self, params: Params) -> Params:
        """The leaves that `project` needs: the head's, or the embedding's if the two are tied.

        An adapter of the tied head's own is at "own".

        Raises:
            ValueError: the params have no head.
        """
        names = self.config.names
        own = params.get(names.head, {})
        if "kernel" in own or copy_of("kernel") in own:
            return own
        if not self.config.tie_word_embeddings:
            raise UserError(
                f"{names.head}/kernel is not in these params: they make no logits. Reward models that transformers "
                "saved have no such head (Model.score is theirs); load the language model for one"
            )
        embedding = tree.subtree(params, names.embedding)
        return embedding | {"own": own} if own else embedding

    def project(self, head: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits from hidden states and the leaves of `head`."""
        if "embedding" in head:
            logits = lora.unembed(hidden, head)
            if "own" in head:
                logits = logits + lora.update(hidden, head["own"]).astype(jnp.float32)
        else:
            logits = lora.linear(hidden, head).astype(jnp.float32)
        if self.config.logits_divisor != 1:
            logits = logits / self.config.logits_divisor
        if cap := self.config.final_softcap:
            logits = cap * jnp.tanh(logits / cap)
        return logits

    def logits(self, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits from hidden states [B, D] or [B, T, D], placed on the mesh in context."""
        rows, vocabulary = sharding.logits_axes(self.config.vocab_size)
        between = (sharding.TOKENS,) * (hidden.ndim - 2)
        hidden = sharding.constrain(hidden, rows, *between, None)
        return sharding.constrain(self.project(self.head(params), hidden), rows, *between, vocabulary)

    def add_score(self, params: Params, key: jax.Array | None = None) -> Params:
        """The params with a score head that belongs to the adapter: score/trained_kernel [D, 1] float32.

        Args:
            key: draws its values from N(0, 0.02²), as transformers does; without it they are zero.

        Raises:
            ValueError: the params already have a score head.
        """
        if SCORE in params:
            raise UserError(f"these params have a score head already: {', '.join(params[SCORE])}")
        shape = (self.config.hidden_size, 1)
        kernel = jnp.zeros(shape, jnp.float32) if key is None else 0.02 * jax.random.normal(key, shape, jnp.float32)
        return params | {SCORE: {copy_of("kernel"): kernel}}

    def score(self, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        """float32 hidden @ kernel of the score head: the reward, or the value, at every position.

        Raises:
            ValueError: the params have no score head.
        """
        if SCORE not in params:
            raise UserError(
                "these params have no score head: add one (Model.add_score), or load a reward model or its adapter"
            )
        kernel = lora.merged_leaf(lora.resolve(params[SCORE]), "kernel").astype(jnp.float32)
        return jnp.matmul(hidden.astype(jnp.float32), kernel, precision="highest")[..., 0]

    def require_positions(self, tokens: int, setting: str = "") -> None:
        """Raises UserError if the model has learned positions, but not for a text of this many tokens.

        Those beyond would give NaN.

        Args:
            setting: the setting that asks for this many, for the message.

        Raises:
            ValueError: the model has learned fewer positions.
        """
        longest = self.config.max_position_embeddings
        if self.config.names.positions and tokens > longest:
            where = f"{setting}: " if setting else ""
            raise UserError(
                f"{where}{tokens} tokens in a row, but {self.config.model_type} has learned {longest} positions"
            )

    def without_row(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> str:
        """A message that names the token ids for which the embedding has no row; "" if it has one for each."""
        rows, found = self.config.vocab_size, set()
        for ids in tokens:
            ids = np.asarray(ids)
            found |= set(ids[(ids < 0) | (ids >= rows)].tolist())
        if not found:
            return ""
        shown = first_few(sorted(found))
        return f"found the token ids {shown}, but the embedding has {rows} rows (ids 0 to {rows - 1})"

    def require_rows(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> None:
        """Raises UserError if the embedding has no row for some token of these lists."""
        if fault := self.without_row(tokens):
            raise UserError(fault)

    def empty_cache(self, params: Params, batch: int, size: int) -> Cache:
        """A cache for `batch` rows of up to `size` tokens, in the dtype of the activations.

        Raises:
            ValueError: the model has learned positions, but fewer than `size`.
        """
        config = self.config
        self.require_positions(size)
        dtype = tree.subtree(params, config.names.embedding)["embedding"].dtype
        rooms: dict[str, tuple[int, Room]] = {}
        for layer in config.layers:
            if layer.shares:  # it reads what another layer keeps
                continue
            stack = config.cache_stack(layer)
            count, _ = rooms.get(stack, (0, {}))
            rooms[stack] = count + 1, MIXERS[layer.mixer].room(config, layer)
        return Cache.empty(rooms, batch, size, dtype)

    def abstract_params(
        self, dtype: jax.typing.DTypeLike = jnp.float32, stacks: tuple[range, ...] | None = None
    ) -> Params:
        """The base tree as ShapeDtypeStructs: what a checkpoint of this architecture must hold.

        Args:
            stacks: the layers of each stack; default: as few stacks as the architecture allows.
        """
        found = _abstract(self, jnp.dtype(dtype), stacks or self.config.stacks)
        return tree.map_with_path(lambda _, leaf: leaf, found)  # a tree of the caller's own

    def random_params(
        self, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32, stacks: tuple[range, ...] | None = None
    ) -> Params:
        """Random params of this architecture, for tests and dry runs; arguments are as in `abstract_params`."""
        return self._initial(key, dtype, stacks or self.config.stacks, jax.vmap)

    def _initial(
        self,
        key: jax.Array,
        dtype: jax.typing.DTypeLike,
        stacks: tuple[range, ...],
        stacked: Callable[[Callable], Callable],
    ) -> Params:
        """`random_params`, whose `stacked` makes the initialisation of one layer that of a stack."""
        config, names = self.config, self.config.names
        tokens, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, config.hidden_size))
        keys = jax.random.split(key, config.num_hidden_layers + 4)
        flat = {
            names.embedding: Embed(config.vocab_size, config.hidden_size).init(keys[0], tokens)["params"],
        }
        if names.norm:
            flat[names.norm] = Norm(config.final_norm or config.norm, config.norm_eps).init(keys[1], x)["params"]
        if names.positions:
            positions = Embed(config.max_position_embeddings, config.hidden_size)
            flat[names.positions] = positions.init(keys[2], tokens)["params"]
        if layer_inputs := names.layer_inputs if config.hidden_size_per_layer_input else None:
            width = config.num_hidden_layers * config.hidden_size_per_layer_input
            embedding = Embed(config.vocab_size_per_layer_input, width)
            flat[layer_inputs.embedding] = embedding.init(keys[2], tokens)["params"]
            flat[layer_inputs.projection] = Linear(width).init(keys[2], x)["params"]
            norm = Norm(config.norm, config.norm_eps)
            flat[layer_inputs.norm] = norm.init(keys[2], x[..., : config.hidden_size_per_layer_input])["params"]
        if not config.tie_word_embeddings:
            flat[names.head] = Linear(config.vocab_size).init(keys[3], x)["params"]
        tables, _ = tables_of(self.config, tokens, tokens, None)
        for layers in stacks:
            block = Block(config, config.structures[layers[0]])
            choices, numbers = tables.of_layers(config, layers)
            own = jnp.zeros((1, 1, config.hidden_size_per_layer_input)) if config.hidden_size_per_layer_input else None
            first = choices.of_layer(jax.tree.map(lambda stack: stack[0], numbers), own, self._no_shared(x))
            init = stacked(lambda key, block=block, first=first: block.init(key, x, first, None)["params"])
            key_of_stack = tree.stack_key(names.stack, layers, config.num_hidden_layers)
            flat[key_of_stack] = init(keys[4 + np.asarray(layers)])
        return tree.map_with_path(lambda _, leaf: leaf.astype(dtype), tree.unflatten(flat))

    def _defaults(
        self, tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        if positions is None:
            self.require_positions(tokens.shape[1])
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        return positions, segment_ids

    def _embed(self, params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        config = self.config
        embed = Embed(config.vocab_size, config.hidden_size)
        x = embed.apply({"params": tree.subtree(params, config.names.embedding)}, tokens)
        if config.embedding_norm:
            x = Norm("rms_bare", config.norm_eps).apply({}, x)
        if config.embedding_scale != 1:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.names.positions:
            learned = Embed(config.max_position_embeddings, config.hidden_size)
            x = x + learned.apply({"params": tree.subtree(params, config.names.positions)}, positions)
        return x

    def _inputs(self, params: Params, tokens: jax.Array, positions: jax.Array, key: jax.Array | None = None) -> Inputs:
        """What goes into the layers."""
        config, names = self.config, self.config.names.layer_inputs
        x = self._embed(params, tokens, positions)
        if not config.hidden_size_per_layer_input:
            return Inputs(x, None)
        count, width = config.num_hidden_layers, config.hidden_size_per_layer_input
        rngs = None if key is None else {"dropout": jax.random.fold_in(key, count)}
        embed, project = Embed(config.vocab_size_per_layer_input, count * width), Linear(count * width)
        own = embed.apply({"params": tree.subtree(params, names.embedding)}, tokens)
        projected = project.apply({"params": tree.subtree(params, names.projection)}, x, rngs=rngs)
        own, projected = (part.reshape(*part.shape[:2], count, width) for part in (own, projected))
        projected = projected * jnp.asarray(config.hidden_size**-0.5, x.dtype)
        norm = Norm(config.norm, config.norm_eps)
        projected = norm.apply({"params": tree.subtree(params, names.norm)}, projected)
        own = (projected + own * jnp.asarray(width**0.5, own.dtype)) * jnp.asarray(2**-0.5, x.dtype)
        return Inputs(x, jnp.moveaxis(own, 2, 0))

    def _no_shared(self, x: jax.Array) -> Shared:
        """Zeros in place of the keys and values that layers share, for the tokens of x [B, T, D]."""
        found = {}
        for layer in self.config.layers:
            if layer.keeps:
                heads = self.config.heads(layer)
                zeros = jnp.zeros((*x.shape[:2], heads.keys, heads.width), x.dtype)
                found[layer.keeps] = zeros, zeros
        return found

    def _layers(
        self,
        params: Params,
        inputs: Inputs,
        tables: Tables,
        cache: Cache | None,
        key: jax.Array | None,
        remat: bool | str,
        observe: Callable[[jax.Array], Params] | None = None,
    ) -> tuple[jax.Array, Cache | None, Params]:
        """Applies all blocks in order, with one compiled body for each stack, scanned over it.

        Layers that differ only in window or rotation share a body, which picks its window and tables by number. Stacks
        that alternate are scanned together.

        Args:
            observe: called with every linear's inputs; what it returns is returned at the linear's path, stacked over
                layers.
        """
        config = self.config
        collections = ["inputs", KEPT] if observe else [KEPT]

        def block(layer: Layer, choices: Choices, shared: Shared, looped: bool) -> Callable:
            module = Block(config, layer, self.attention, lean=is_lean(remat))

            def apply(
                x: jax.Array, cache: Cache | None, numbers: Numbers, own: jax.Array | None, leaves: Params
            ) -> tuple[jax.Array, Cache | None, tuple[Params, Shared]]:
                x = checkpoint_name(x, LAYER_INPUT)
                rngs = None if key is None else {"dropout": jax.random.fold_in(key, numbers.layer)}
                context = choices.of_layer(numbers, own, shared)
                (x, cache), sown = module.apply({"params": leaves}, x, context, cache, rngs=rngs, mutable=collections)
                return x, cache, (_observed(sown, observe), _kept(sown))

            return rematerialised(apply, remat, looped=looped)

        seen, shared, x = {}, {}, inputs.x
        for group in self._groups(params):
            chosen = [tables.of_layers(config, layers) for _, _, layers in group]
            looped = len(group) == 1 and len(group[0][2]) > 1  # XLA unrolls loops of one turn
            blocks = [
                block(config.structures[layers[0]], choices, dict(shared), looped)
                for (_, _, layers), (choices, _) in zip(group, chosen, strict=True)
            ]

            def body(carry: tuple, members: tuple, blocks: list = blocks) -> tuple[tuple, tuple]:
                found = []
                for apply, member in zip(blocks, members, strict=True):
                    *carry, observed = apply(*carry, *member)
                    found.append(observed)
                return tuple(carry), tuple(found)

            members = tuple(
                (numbers, None if inputs.own is None else inputs.own[np.asarray(layers)], leaves)
                for (_, leaves, layers), (_, numbers) in zip(group, chosen, strict=True)
            )
            (x, cache), found = jax.lax.scan(body, (x, cache), members)
            for (path, _, _), (observed, kept) in zip(group, found, strict=True):
                seen |= {f"{path}/{name}": leaf for name, leaf in tree.flatten(observed).items()}
                shared |= jax.tree.map(lambda stack: stack[0], kept)  # a layer that keeps has no like in its stack
        return x, cache, tree.unflatten(seen)

    def _groups(self, params: Params) -> list[list[tuple[str, Params, range]]]:
        """(path, leaves, layers) of the stacks in the order of their layers; alternating stacks form one group."""
        total = self.config.num_hidden_layers
        found = [
            (path, leaves, tree.stack_of(f"{path}/leaf").indices(total))
            for path, leaves in tree.stacks(params, self.config.names.stack).items()
        ]
        groups: list[list[tuple[str, Params, range]]] = []
        for stack in sorted(found, key=lambda stack: stack[2][0]):
            layers, last = stack[2], groups[-1] if groups else []
            alternates = layers.step > 1 and bool(last) and len(layers) == len(last[0][2])
            if alternates and layers[0] == last[-1][2][0] + 1:
                last.append(stack)
            else:
                groups.append([stack])
        return groups


@functools.lru_cache(maxsize=256)  # a checkpoint is described several times while it is opened
def _abstract(model: Model, dtype: np.dtype, stacks: tuple[range, ...]) -> Params:
    return jax.eval_shape(lambda: model._initial(jax.random.key(0), dtype, stacks, _repeated))


def _repeated(init: Callable) -> Callable:
    """What `jax.vmap` gives, but of the first key again and again: the same shapes for half of the tracing."""

    def stack(keys: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(keys), *leaf.shape)), init(keys[0]))

    return stack


def _kept(sown: Params) -> Shared:
    """The keys and values that the layer kept for later ones."""
    return {path.split("/")[-1]: calls[0] for path, calls in tree.flatten(sown.get(KEPT, {})).items()}


def _observed(sown: Params, observe: Callable[[jax.Array], Params] | None) -> Params:
    """What `observe` returns for every linear's inputs, at the linear's path."""
    if observe is None:
        return {}
    flat = {}
    for path, calls in tree.flatten(sown["inputs"]).items():
        module = path.rpartition("/")[0]
        flat |= {f"{module}/{name}": value for name, value in observe(calls[0]).items()}
    return tree.unflatten(flat)
