"""Work on data that several processes divide among themselves, each of which gets all results in order."""

import base64
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jlora import sharding
from jlora.data.records import Placed
from jlora.data.store import Example, Item
from jlora.errors import UserError

BLOCK = 256  # what a process does between two exchanges


def divided(given: Iterable[Any], work: Callable[[Iterable[Any]], Iterable[Any]]) -> Iterator[Any]:
    """What `work` makes of what is given, one by one: each process has its share of every block.

    So nobody holds more than a block for each process, whatever follows runs as if this process had done everything,
    and no folder has to be shared. A collective: call it on all processes, with the same.

    Args:
        work: (some of what is given) → as many results in their order; what it raises, all processes raise.
    """
    given, count, number = iter(given), jax.process_count(), jax.process_index()
    if count == 1:
        yield from work(given)
        return
    while block := list(itertools.islice(given, BLOCK * count)):
        edges = [len(block) * place // count for place in range(count + 1)]
        try:
            mine = pack(list(work(block[edges[number] : edges[number + 1]])))
        except UserError as error:
            mine = pack(error)
        for part in map(unpack, sharding.from_all_hosts(mine)):
            if isinstance(part, UserError):
                raise part
            yield from part


def require_same(values: dict[str, str]) -> None:
    """Raises UserError on all processes if these are not the same on all. A collective: call it on all."""
    found = [unpack(content) for content in sharding.from_all_hosts(pack(values))]
    if other := sorted({name for one in found for name in values if one[name] != found[0][name]}):
        numbers = ", ".join(str(number) for number, one in enumerate(found) if one != found[0])
        raise UserError(f"process {numbers}: found other {' and '.join(other)} than in process 0, expected the same")


def pack(value: Any) -> bytes:
    """What processes send each other, as JSON: plain values, arrays, items, records and errors.

    Raises:
        UserError: a record holds something else, such as a date.
    """
    return json.dumps(_spelled(value)).encode()


def unpack(content: bytes) -> Any:
    """The value that `pack` made bytes of; an error of any kind is a UserError."""
    return _read(json.loads(content))


# How each type is spelled: its letter, its parts, and what makes it of these again.
_KINDS: dict[type, tuple[str, Callable[[Any], list], Callable[..., Any]]] = {
    list: ("list", list, lambda *parts: list(parts)),
    tuple: ("tuple", list, lambda *parts: parts),
    dict: ("dict", lambda value: list(value.items()), lambda *pairs: dict(pairs)),
    np.ndarray: (
        "array",
        lambda value: [value.dtype.str, list(value.shape), base64.b64encode(np.ascontiguousarray(value)).decode()],
        lambda kind, shape, content: np.frombuffer(base64.b64decode(content), kind).reshape(shape),
    ),
    Example: ("example", lambda value: [value.tokens, value.trained], Example),
    Item: ("item", lambda value: [value.documents, dict(value.values), value.record], Item),
    Placed: ("record", lambda value: [dict(value), value.place, value.source], Placed),
    UserError: ("error", lambda value: [str(value)], UserError),
}
_MAKERS = {letter: make for letter, _, make in _KINDS.values()}


def _spelled(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for kind, (letter, parts, _) in _KINDS.items():
        if type(value) is kind or (kind is UserError and isinstance(value, UserError)):
            return [letter, *map(_spelled, parts(value))]
    raise UserError(f"found {value!r:.60} ({type(value).__name__}) in a record, expected what JSON can hold")


def _read(spelled: Any) -> Any:
    if not isinstance(spelled, list):
        return spelled
    letter, *parts = spelled
    return _MAKERS[letter](*map(_read, parts))
