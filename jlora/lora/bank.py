"""Many adapters beside one base: each row of a batch uses one of them, a weighted sum of several, or none."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from jlora import sharding, tree
from jlora.errors import UnknownNameError, UserError, number_of
from jlora.lora.config import LoraConfig
from jlora.lora.kinds import BIAS
from jlora.lora.kinds.banked import IDS, WEIGHTS
from jlora.lora.kinds.kind import DROPOUT, RANK, SCALE
from jlora.lora.kinds.product import START_A, START_B, A, B
from jlora.lora.partition import adapter_leaves, overlay, strip, with_starts
from jlora.lora.setup import init
from jlora.lora.sites import is_expert, sites
from jlora.lora.starts import shifts_base
from jlora.lora.vocabulary import marks, require_same_rows, without_marks
from jlora.types import Params

# What a row uses: an adapter by name, several with weights, or None for the base alone.
Choice = str | Mapping[str, int | float] | None

NEEDED = {leaf.name: leaf for leaf in (A, B, SCALE)}
HELD = NEEDED | {leaf.name: leaf for leaf in BIAS.leaves}
# Nearly all of a bank's memory; the rest is in float32 whatever the bank's dtype.
FACTORS = (A.name, B.name)
DTYPES = ("float32", "bfloat16")
# Settings that do not change what an adapter computes once its factors are padded.
IGNORED = (RANK.name, DROPOUT.name)


class Places(NamedTuple):
    """Which adapters each of B rows uses, at most K of them, and with what weights."""

    numbers: Int[Array, "B K"]
    weights: Float[Array, "B K"]


@dataclasses.dataclass(frozen=True)
class Bank:
    """Adapters in numbered places.

    Adding, removing and choosing adapters never recompiles: the number of places, the ranks and, up to `width`, the
    number of adapters a row uses are fixed.

    A bank holds updates of linears and embeddings: lora_a, lora_b, lora_bias. It refuses DoRA, modules_to_save, bias=,
    trainable_token_indices, adapters of an embedding that also act in its tied head, and adapters of experts and
    routers: use those alone, or merge them.

    Attributes:
        params: the base with, at every module, lora_a [*stack, places + 1, D, R] and so on. The last place is empty.
            Give a model the params that `choose` or `alone` returns, not these.
        names: the adapters' names, None where a place is free.
        width: how many adapters are read for every row. A batch in which a row mixes more is as wide as that row, and
            each such width compiles once.
    """

    params: Params
    names: tuple[str | None, ...]
    width: int = 1

    @classmethod
    def of(
        cls,
        params: Params,
        adapters: Mapping[str, Params],
        *,
        places: int | None = None,
        config: LoraConfig | None = None,
        width: int = 1,
        dtype: str = "float32",
    ) -> "Bank":
        """A bank of these adapters for the base of `params`.

        Args:
            adapters: trees that hold adapters (params, or their `adapter_leaves`), by name.
            places: how many adapters to make room for; default: as many as are given.
            config: the modules and the rank to make room for; default: those of the adapters.
            width: how many adapters a row may mix without recompiling. This many are read for every row, whether it
                mixes or not: with 2 a decoding step reads twice as many adapters.
            dtype: of the factors. "bfloat16" takes half the memory, and a step reads half as much: factors and
                activations are rounded to it, sums are in float32. For GPUs and TPUs: a CPU has no fast product in it.

        Raises:
            ValueError: there are adapters that a bank cannot hold; all are listed.
        """
        _require_names(adapters)
        base = strip(params)
        require_same_rows(params, adapters)
        leaves = {name: _leaves(base, adapter) for name, adapter in adapters.items()}
        given = list(leaves.items())
        if config is not None:
            given.append(("config", tree.flatten(_shapes(base, config))))
        count = len(adapters) if places is None else places
        if width < 1:
            raise UserError(f"width: found {width}, expected at least 1")
        if dtype not in DTYPES:
            raise UserError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
        if not given:
            raise UserError("found neither adapters nor config: one of them says what modules and ranks need room")
        if count < max(1, len(adapters)):
            raise UserError(
                f"found {number_of(count, 'place')} for {number_of(len(adapters), 'adapter')}, "
                "expected one for each, and at least one"
            )
        room = _room(base, [flat for _, flat in given])
        missing = "the base has no matrix at {}"
        if faults := [fault for name, flat in given for fault in _faults(name, flat, base, room, missing)]:
            raise UserError("these adapters do not go into one bank:\n  " + "\n  ".join(faults))
        mesh, filled = _mesh(base), {}
        for path, shape in room.items():
            axis = len(shape) - _own_axes(path)
            held = jnp.dtype(dtype if _name(path) in FACTORS else "float32")
            leaf = np.zeros((*shape[:axis], count + 1, *shape[axis:]), held)
            for place, flat in enumerate(leaves.values()):
                if path in flat:
                    leaf[_index(path, leaf, place, flat[path].shape)] = np.asarray(flat[path])
            filled[path] = _placed(path, leaf, mesh)
        return cls(
            overlay(base, tree.unflatten(filled | marks(params))),
            (*adapters, *(None,) * (count - len(adapters))),
            width,
        )

    def add(self, name: str, adapter: Params, *, donate: bool = False) -> "Bank":
        """The bank with one more adapter, which replaces any that it has under this name.

        Args:
            donate: give up this bank's arrays, so that memory holds them only once; this bank is then of no more use.

        Raises:
            ValueError: there is no room for the adapter; everything that does not fit is listed.
        """
        _require_names([name])
        require_same_rows(self.params, {name: adapter})
        flat = _leaves(strip(self.params), adapter)
        held = {path: leaf for path, leaf in tree.flatten(self.params).items() if _name(path) in HELD}
        room = {path: _without(_place_axis(path, leaf), leaf.shape) for path, leaf in held.items()}
        missing = "the bank has no room at {}; give its modules as config when making the bank"
        faults = _faults(name, flat, self.params, room, missing)
        if name not in self.names and None not in self.names:
            faults.append(
                f"{number_of(len(self.names), 'place')}, none of them free: remove one, or make a bank with more places"
            )
        if faults:
            raise UserError(f"adapter {name!r} does not fit:\n  " + "\n  ".join(faults))
        place = self.names.index(name if name in self.names else None)
        return self._with(place, name, flat, donate=donate)

    def remove(self, name: str) -> "Bank":
        """The bank without this adapter.

        Raises:
            KeyError: the bank has no adapter of this name.
        """
        if name is None:
            raise UnknownNameError("None is the base alone, which every bank holds")
        return self.clear(self.number(name))

    def clear(self, place: int, *, donate: bool = False) -> "Bank":
        """The bank with nothing in this place; `donate` as in `add`."""
        return self._with(place, None, {}, donate=donate)

    def number(self, name: str | None) -> int:
        """The place of an adapter; for None, the place that is always empty.

        Raises:
            KeyError: the bank has no adapter of this name.
        """
        if name is None:
            return len(self.names)
        if name not in self.names:
            held = ", ".join(repr(other) for other in self.names if other is not None) or "none"
            raise UnknownNameError(f"there is no adapter {name!r} in the bank; it holds {held}")
        return self.names.index(name)

    def places(self, choices: Sequence[Choice]) -> Places:
        """The rows' choices as place numbers and weights, at least `width` for each row.

        Raises:
            UserError: `choices` is a single choice, not a list of them.
            KeyError: the bank does not hold one of the adapters.
        """
        if isinstance(choices, str | Mapping):
            raise UserError(f"found {choices!r} alone, expected one choice for each row: give a list of them")
        wanted = [
            dict(choice) if isinstance(choice, Mapping) else {} if choice is None else {choice: 1.0}
            for choice in choices
        ]
        most = max([self.width, *map(len, wanted)])
        numbers = np.full((len(wanted), most), len(self.names), np.int32)
        weights = np.zeros((len(wanted), most), np.float32)
        for row, members in enumerate(wanted):
            for column, (name, weight) in enumerate(members.items()):
                numbers[row, column], weights[row, column] = self.number(name), weight
        return Places(jnp.asarray(numbers), jnp.asarray(weights))

    def choose(self, choices: Sequence[Choice]) -> Params:
        """Params for a batch with one row for each choice: an adapter, a weighted sum of adapters, or the base alone.

        Raises:
            KeyError: the bank does not hold one of the adapters.
        """
        return choose(self.params, *self.places(choices))

    def alone(self, name: str | None) -> Params:
        """Params with one adapter for every row, in float32; with None, the base alone.

        Raises:
            KeyError: the bank has no adapter of this name.
        """
        place = self.number(name)

        def pick(path: str, leaf: Any) -> Any:
            if _name(path) not in HELD:
                return leaf
            return jnp.take(leaf, place, axis=_place_axis(path, leaf)).astype(jnp.float32)

        if name is None:
            return strip(self.params)
        return tree.map_with_path(pick, self.params)

    def _with(self, place: int, name: str | None, flat: Mapping[str, Any], *, donate: bool = False) -> "Bank":
        """The bank with these leaves at `place`, and zeros for the leaves not given."""
        mesh, write = _mesh(self.params), _WRITE_DONATED if donate else _WRITE

        def put(path: str, leaf: Any) -> Any:
            if _name(path) not in HELD:
                return leaf
            axis = _place_axis(path, leaf)
            new = np.zeros(_without(axis, leaf.shape), leaf.dtype)
            if path in flat:
                new[tuple(map(slice, flat[path].shape))] = np.asarray(flat[path])
            return _placed(path, write(leaf, new, np.int32(place), axis), mesh)

        names = (*self.names[:place], name, *self.names[place + 1 :])
        return dataclasses.replace(self, params=tree.map_with_path(put, self.params), names=names)


def _write(leaf: jax.Array, new: jax.Array, place: jax.Array, axis: int) -> jax.Array:
    """The bank's leaf with another at `place`: padded to the full rank, any adapter's, so that one program does."""
    return jax.lax.dynamic_update_index_in_dim(leaf, new, place, axis)


_WRITE = jax.jit(_write, static_argnums=3)
_WRITE_DONATED = jax.jit(_write, static_argnums=3, donate_argnums=0)


def choose(params: Params, numbers: Int[Array, "B K"], weights: Float[Array, "B K"]) -> Params:
    """The params of a bank with the adapters that each row uses, at every module.

    They are `lora_ids` and `lora_weights` [*stack, B, K].

    Args:
        params: a `Bank`'s params.
        numbers, weights: what `Bank.places` returns.
    """

    def mark(path: str, module: Params) -> Params:
        if SCALE.name not in module:
            return module
        stack = module[SCALE.name].shape[:-1]
        return module | {
            leaf.name: jnp.broadcast_to(values, (*stack, *values.shape))
            for leaf, values in ((IDS, numbers), (WEIGHTS, weights))
        }

    return tree.map_modules(mark, params)


def refuse_chosen(params: Params, instead: str) -> None:
    """Raises ValueError for params from `Bank.choose`, which functions that reorder rows or split them cannot use.

    Args:
        instead: what the error message says to give instead.
    """
    if any(path.endswith(f"/{IDS.name}") for path in tree.flatten(params)):
        raise UserError(f"found params of Bank.choose, whose adapters belong to the rows of one batch: give {instead}")


def _require_names(names: Iterable[Any]) -> None:
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise UserError(f"adapters' names: found {wrong}, expected strings (None is the base alone)")


def _leaves(base: Params, adapter: Params) -> dict[str, Any]:
    """An adapter's leaves, with its updates as plain products."""
    flat = without_marks(tree.flatten(adapter_leaves(adapter)))
    # Without A and B there is nothing to make the start a part of; `_faults` says what is missing.
    parts = {START_A.name: A.name, START_B.name: B.name}
    if all(path.replace(start, part) in flat for path in flat for start, part in parts.items()):
        return tree.flatten(adapter_leaves(with_starts(overlay(base, tree.unflatten(flat)))))
    return flat


def _shapes(base: Params, config: LoraConfig) -> Params:
    """The shapes of an adapter of this config, at the widest rank that its initialisation can give.

    What the initialisation reads (gradients, moments, …) is not needed.
    """
    start = config.init_lora_weights
    wider = 2 if shifts_base(start) else config.eva_rho if start == "eva" else 1
    ranks = tuple((name, round(rank * wider)) for name, rank in config.rank_pattern)
    drawn = dataclasses.replace(config, init_lora_weights=True, r=round(config.r * wider), rank_pattern=ranks)
    return jax.eval_shape(lambda base: adapter_leaves(with_starts(init(base, drawn, jax.random.key(0)))), base)


def _room(base: Params, adapters: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Path → shape that every one of these adapters fits in, for the leaves that they have beside matrices."""
    ranks: dict[str, int] = {}
    for flat in adapters:
        for path, leaf in flat.items():
            module, _, last = path.rpartition("/")
            if last == A.name:
                ranks[module] = max(ranks.get(module, 0), leaf.shape[-1])
    room = {}
    for site in sites(base):
        if site.axes == (1, 1):
            sizes = {"inputs": site.inputs, "rank": ranks.get(site.path, 0), "outputs": site.outputs}
            for name, leaf in HELD.items():
                room[f"{site.path}/{name}"] = (*site.stack_shape, *(sizes[axis] for axis in leaf.axes))
    return {path: shape for path, shape in room.items() if any(path in flat for flat in adapters)}


def _faults(
    name: str, flat: Mapping[str, Any], params: Params, room: Mapping[str, tuple[int, ...]], missing: str
) -> list[str]:
    """The reasons why these leaves do not fit beside the base of `params`, with `room` for each path."""
    modules: dict[str, list[str]] = {}
    for path in flat:
        module, _, last = path.rpartition("/")
        modules.setdefault(module, []).append(last)
    some = any(A.name in names for names in modules.values())
    faults = [] if some else [f"{name}: found no lora_a, expected an adapter"]
    beside = tree.flatten(params)
    for module, names in modules.items():
        if is_expert(f"{module}/") or f"{module}/router" in beside:
            faults.append(
                f"{name}: {module} is a router or a kernel of experts, whose rows are not those of the batch: use it "
                "alone, or merge it"
            )
            continue
        held = [last for last in names if last in HELD]
        if held and (lacking := [last for last in NEEDED if last not in names]):
            faults.append(f"{name}: {module} lacks {', '.join(lacking)}: give params, or all of their adapter_leaves")
        for last in names:
            path = f"{module}/{last}"
            if last not in (*HELD, *IGNORED):
                faults.append(
                    f"{name}: {path} is more than a bank holds ({', '.join(HELD)}): use it alone, or merge it"
                )
            elif last in held and path not in room:
                faults.append(f"{name}: {missing.format(path)}")
            elif last in held and not _fits(last, flat[path].shape, room[path]):
                faults.append(f"{name}: {path}: found {flat[path].shape}, expected at most {room[path]}")
    return faults


def _fits(name: str, shape: tuple[int, ...], room: tuple[int, ...]) -> bool:
    """Whether the shapes are equal, except that the rank may be smaller."""
    if len(shape) != len(room):
        return False
    rank = (HELD[name].rank_axis or 0) + len(room)
    return all(
        own <= full if axis == rank else own == full for axis, (own, full) in enumerate(zip(shape, room, strict=True))
    )


def _index(path: str, leaf: Any, place: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The index of an adapter's leaf of this shape in the bank's leaf: its place, and the first of the ranks."""
    axis = _place_axis(path, leaf)
    return (*map(slice, shape[:axis]), place, *map(slice, shape[axis:]))


def _mesh(params: Params) -> Mesh | None:
    """The mesh that the params are on, or None."""
    placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return placed.mesh if isinstance(placed, NamedSharding) else None


def _placed(path: str, leaf: Any, mesh: Mesh | None) -> jax.Array:
    """A bank's leaf on the devices, sharded as an adapter's leaf beside its kernel."""
    return jnp.asarray(leaf) if mesh is None else jax.device_put(leaf, sharding.leaf_sharding(path, leaf, mesh))


def _name(path: str) -> str:
    """The last part of a leaf's path."""
    return path.rpartition("/")[2]


def _own_axes(path: str) -> int:
    """How many axes a leaf has after its stacking axes."""
    return len(HELD[_name(path)].axes)


def _place_axis(path: str, leaf: Any) -> int:
    return leaf.ndim - _own_axes(path) - 1


def _without(axis: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
