"""Mixtures: every epoch has its shares, every record of a source its turn."""

import numpy as np
import pytest

from jlora.data import plan
from jlora.data.mixing import mixed

CASES = [((10, 1000, 3), (5.0, 1.0, 0.001)), ((7, 7), (1.0, 1.0)), ((1, 100, 100), (1.0, 1.0, 1.0)), ((5,), (3.0,))]


@pytest.mark.parametrize(("counts", "weights"), CASES)
def test_each_epoch_has_its_shares_and_each_record_comes_as_often_as_the_next(counts, weights):
    epochs = [mixed(counts, weights, 3, epoch) for epoch in range(40)]
    assert all(len(epoch) == sum(counts) for epoch in epochs)
    times = np.bincount(np.concatenate(epochs), minlength=sum(counts))
    for count, weight, own in zip(counts, weights, np.split(times, np.cumsum(counts)[:-1]), strict=True):
        assert own.max() - own.min() <= 1
        assert abs(own.sum() - 40 * sum(counts) * weight / sum(weights)) <= 1
        assert len(own) == count


def test_equal_shares_of_equal_sources_are_every_record_once():
    assert sorted(mixed((6, 6), (2.0, 2.0), 0, 5)) == list(range(12))


def test_epochs_and_seeds_differ_and_are_reproduced():
    first, again, later, other = (
        mixed((50, 9), (1.0, 1.0), seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    assert first != later
    assert first != other


def test_a_longer_plan_of_a_mixture_begins_with_the_steps_of_a_shorter_one():
    settings = dict(seq_len=64, batch_size=4, packing=True, counts=(40, 10), weights=(1.0, 1.0))
    lengths = np.arange(50) % 20 + 5
    short, long = (plan(lengths, epochs=epochs, **settings) for epochs in (2, 5))
    assert long[: len(short) - 1] == short[:-1]
    taken = [index for step in long for row in step.rows for index in row]
    assert len(taken) == 250
    assert abs(sum(index < 40 for index in taken) - 125) <= 1
