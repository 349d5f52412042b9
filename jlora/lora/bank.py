"""Many adapters beside one base: each row of a batch has its own, or several with weights, or none."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora import tree
from jlora.lora.config import LoraConfig
from jlora.lora.partition import adapter_leaves, overlay, strip, with_starts
from jlora.lora.setup import init
from jlora.lora.targets import is_expert
from jlora.types import Params

# What a row asks for: an adapter by name, several with weights, or None for the base alone.
Choice = str | Mapping[str, int | float] | None

HELD = ("lora_a", "lora_b", "lora_bias", "lora_scale")
# Settings that do not change what an adapter computes, once its factors are padded.
IGNORED = ("lora_rank", "lora_dropout")


class Places(NamedTuple):
    """Which adapters each of B rows uses, at most K of them, and with what weights."""

    numbers: Int[Array, "B K"]
    weights: Float[Array, "B K"]


@dataclasses.dataclass(frozen=True)
class Bank:
    """Adapters in numbered places. Adding, removing and choosing compile nothing anew: places and ranks are fixed, and
    so is how many adapters a row uses, up to `width`.

    Attributes:
        params: the base with, at every module, lora_a [*stack, places + 1, D, R] and so on. The last place is empty. A
            model takes what `choose` or `alone` make of them, not these.
        names: of the adapters, None where a place is free.
        width: how many adapters every row is read with. A batch in which a row mixes more is as wide as that row, which
            compiles once for each such width.
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
    ) -> "Bank":
        """A bank of these adapters of the base of `params`.

        Args:
            adapters: trees that hold them (params, or their `adapter_leaves`), by name.
            places: how many adapters there is room for, default as many as are given.
            config: the modules and the rank that there is room for, default those of the adapters.
            width: how many adapters rows may mix before anything is compiled anew. Every row is read with as many,
                whether it mixes or not: with 2 a decoding step reads twice the adapters.

        Raises:
            ValueError: adapters that a bank cannot hold; all are listed.
        """
        base = strip(params)
        leaves = {name: _leaves(adapter) for name, adapter in adapters.items()}
        given = list(leaves.items())
        if config is not None:
            given.append(("config", _leaves(init(base, config, jax.random.key(0)))))
        rooms = [flat for _, flat in given]
        count = len(adapters) if places is None else places
        if width < 1:
            raise ValueError(f"width: found {width}, expected at least 1")
        if not rooms or count < max(1, len(adapters)):
            raise ValueError(f"found {count} places for {len(adapters)} adapters, expected at least one and enough")
        empty = {path: _room([flat[path] for flat in rooms if path in flat], path, count) for path in _union(rooms)}
        bank = cls(overlay(base, tree.unflatten(empty)), (None,) * count, width)
        if faults := [fault for name, flat in given for fault in bank._faults(name, flat)]:
            raise ValueError("these adapters do not go into one bank:\n  " + "\n  ".join(faults))
        for path, leaf in empty.items():
            for place, flat in enumerate(leaves.values()):
                if path in flat:
                    leaf[_index(path, leaf, place, flat[path].shape)] = np.asarray(flat[path])
        filled = tree.unflatten({path: jnp.asarray(leaf) for path, leaf in empty.items()})
        return cls(overlay(base, filled), (*adapters, *(None,) * (count - len(adapters))), width)

    def add(self, name: str, adapter: Params) -> "Bank":
        """The bank with one more adapter, or with another one under a name that it has.

        Raises:
            ValueError: there is no room for it; everything that does not fit is listed.
        """
        flat = _leaves(adapter)
        faults = self._faults(name, flat)
        if name not in self.names and None not in self.names:
            faults.append(f"all {len(self.names)} places are taken: remove one, or make a bank with more places")
        if faults:
            raise ValueError(f"adapter {name!r} does not fit:\n  " + "\n  ".join(faults))
        place = self.names.index(name if name in self.names else None)
        return self._with(place, name, flat)

    def remove(self, name: str) -> "Bank":
        """The bank without an adapter.

        Raises:
            KeyError: there is none of that name.
        """
        return self._with(self.number(name), None, {})

    def number(self, name: str | None) -> int:
        """The place of an adapter; for None the one that is always empty.

        Raises:
            KeyError: there is none of that name.
        """
        if name is None:
            return len(self.names)
        if name not in self.names:
            held = ", ".join(repr(other) for other in self.names if other is not None) or "none"
            raise KeyError(f"there is no adapter {name!r} in the bank; it holds {held}")
        return self.names.index(name)

    def places(self, choices: Sequence[Choice]) -> Places:
        """What the rows ask for, as numbers: at least `width` for each."""
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
        """Params for a batch of as many rows, each with the adapter, or the weighted sum of adapters, that it asks for.

        Raises:
            KeyError: an adapter that the bank does not hold.
        """
        return choose(self.params, *self.places(choices))

    def alone(self, name: str | None) -> Params:
        """Params with one adapter, the same for every row."""
        place = self.number(name)

        def pick(path: str, leaf: Any) -> Any:
            return jnp.take(leaf, place, axis=_place_axis(path, leaf)) if path.rpartition("/")[2] in HELD else leaf

        if name is None:
            return strip(self.params)
        return tree.map_with_path(pick, self.params)

    def _faults(self, name: str, flat: Mapping[str, Any]) -> list[str]:
        room = tree.flatten(self.params)
        apart = sorted({path.rpartition("/")[0] for path in flat if _is_apart(path, room)})
        faults = [
            f"{name}: {module} is a router or a kernel of experts, whose rows are not those of the batch: use it "
            "alone, or merge it"
            for module in apart
        ]
        for path, leaf in flat.items():
            module, _, last = path.rpartition("/")
            if module in apart:
                continue
            if last not in (*HELD, *IGNORED):
                faults.append(
                    f"{name}: {path} is more than a bank holds ({', '.join(HELD)}): use it alone, or merge it"
                )
            elif last in HELD and path not in room:
                faults.append(
                    f"{name}: the bank has no room at {path}; give its modules as config when making the bank"
                )
            elif last in HELD:
                axis = _place_axis(path, room[path])
                expected = room[path].shape[:axis] + room[path].shape[axis + 1 :]
                rank = _rank_axis(last)
                same = [
                    (a, b) for i, (a, b) in enumerate(zip(leaf.shape, expected, strict=False)) if i - leaf.ndim != rank
                ]
                fits = rank is None or leaf.shape[rank] <= expected[rank]
                if leaf.ndim != len(expected) or not fits or any(a != b for a, b in same):
                    faults.append(f"{name}: {path}: found {leaf.shape}, expected at most {expected}")
        return faults

    def _with(self, place: int, name: str | None, flat: Mapping[str, Any]) -> "Bank":
        """The bank with these leaves in a place, zero where there are none."""

        def put(path: str, leaf: Any) -> Any:
            if path.rpartition("/")[2] not in HELD:
                return leaf
            axis = _place_axis(path, leaf)
            leaf = leaf.at[(slice(None),) * axis + (place,)].set(0)
            return leaf.at[_index(path, leaf, place, flat[path].shape)].set(flat[path]) if path in flat else leaf

        names = (*self.names[:place], name, *self.names[place + 1 :])
        return dataclasses.replace(self, params=tree.map_with_path(put, self.params), names=names)


def choose(params: Params, numbers: Int[Array, "B K"], weights: Float[Array, "B K"]) -> Params:
    """The params of a bank with `lora_ids` and `lora_weights` [*stack, B, K] at every module: what each row uses."""

    def mark(path: str, module: Params) -> Params:
        if "lora_scale" not in module:
            return module
        stack = module["lora_scale"].shape[:-1]
        return module | {
            "lora_ids": jnp.broadcast_to(numbers, (*stack, *numbers.shape)),
            "lora_weights": jnp.broadcast_to(weights, (*stack, *weights.shape)),
        }

    return tree.map_modules(mark, params)


def _is_apart(path: str, flat: Mapping[str, Any]) -> bool:
    """Whether the leaf belongs to a module that sees tokens sorted or flattened, so that no row is known to it."""
    return is_expert(path) or f"{path.rpartition('/')[0]}/router" in flat


def _leaves(adapter: Params) -> dict[str, Any]:
    return tree.flatten(adapter_leaves(with_starts(adapter)))


def _union(rooms: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({path for flat in rooms for path in flat if path.rpartition("/")[2] in HELD})


def _index(path: str, leaf: Any, place: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Where an adapter's leaf of this shape goes: its place, and the first ranks of those that there is room for."""
    axis = _place_axis(path, leaf)
    return (*map(slice, shape[:axis]), place, *map(slice, shape[axis:]))


def _room(leaves: Sequence[Any], path: str, places: int) -> np.ndarray:
    """Zeros for so many leaves like these, of the widest rank, and an empty one."""
    shape = list(np.max([leaf.shape for leaf in leaves if leaf.ndim == leaves[0].ndim], axis=0))
    axis = len(shape) - _own_axes(path)
    return np.zeros((*shape[:axis], places + 1, *shape[axis:]), np.float32)


def _own_axes(path: str) -> int:
    """How many axes a leaf has behind those that it is stacked by."""
    return {"lora_scale": 0, "lora_bias": 1}.get(path.rpartition("/")[2], 2)


def _place_axis(path: str, leaf: Any) -> int:
    return leaf.ndim - _own_axes(path) - 1


def _rank_axis(name: str) -> int | None:
    return {"lora_a": -1, "lora_b": -2}.get(name)
