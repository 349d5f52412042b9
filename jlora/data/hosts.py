"""Work on data that several processes divide among themselves, each of which gets all results in order."""

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jlora import sharding
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
            mine = list(work(block[edges[number] : edges[number + 1]]))
        except UserError as error:
            mine = error
        for part in map(pickle.loads, sharding.from_all_hosts(pickle.dumps(mine))):  # from this job's own processes
            if isinstance(part, UserError):
                raise part
            yield from part


def require_same(values: dict[str, str]) -> None:
    """Raises UserError on all processes if these are not the same on all. A collective: call it on all."""
    found = [pickle.loads(content) for content in sharding.from_all_hosts(pickle.dumps(values))]
    if other := sorted({name for one in found for name in values if one[name] != found[0][name]}):
        numbers = ", ".join(str(number) for number, one in enumerate(found) if one != found[0])
        raise UserError(f"process {numbers}: found other {' and '.join(other)} than in process 0, expected the same")
