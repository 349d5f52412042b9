"""The order of a mixture: which records of each source come in an epoch, each as often as the others of its source."""

from collections.abc import Sequence

import numpy as np

_FIRST_SOURCE = 2  # purposes below are those of `jlora.data.packing`


def generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    """A generator for one purpose in one epoch. PCG64 by name, because NumPy's default generator may change."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, purpose])))


def mixed(counts: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The records of one epoch of a mixture, source by source, int64 [N]; those of a source are in a random order.

    N is the number of records. A source's records are gone through in passes, each in an order of its own, that go on
    from epoch to epoch: so each comes as often as the others.

    Args:
        counts: records of each source, whose numbers follow one another.
        weights: each source's share of the records, relative to the others'.
    """
    starts = _taken(counts, weights, epoch)
    ends = _taken(counts, weights, epoch + 1)
    firsts, found = np.cumsum([0, *counts]), []
    for number, (count, start, end) in enumerate(zip(counts, starts.tolist(), ends.tolist(), strict=True)):
        for one in range(start // count, -(-end // count)):
            order = generator(seed, one, _FIRST_SOURCE + number).permutation(count)
            found.append(firsts[number] + order[max(0, start - one * count) : end - one * count])
    return np.concatenate(found)


def _taken(counts: Sequence[int], weights: Sequence[float], epochs: int) -> np.ndarray:
    """How many records were taken from each source after so many epochs, each of as many as there are."""
    total = sum(counts)
    shares = total * np.asarray(weights, np.float64) / sum(weights)
    taken = np.zeros(len(counts), np.int64)
    for epoch in range(epochs):
        wanted = (epoch + 1) * shares - taken
        some = np.floor(np.maximum(wanted, 0)).astype(np.int64)
        while (missing := total - int(some.sum())) != 0:
            left = wanted - some
            place = np.argmax(left) if missing > 0 else np.argmin(np.where(some > 0, left, np.inf))
            some[place] += np.sign(missing)
        taken = taken + some
    return taken
