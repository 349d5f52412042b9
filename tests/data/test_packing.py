"""The plan: nothing lost, nothing twice, rows full, few shapes, and the same everywhere."""

import collections

import numpy as np
import pytest

from jlora.data import packing
from jlora.data.packing import Step, plan


def random_lengths(count, seq_len, seed=0):
    values = np.random.Generator(np.random.PCG64(seed)).lognormal(4.0, 0.6, count)
    return np.clip(values.astype(int), 1, seq_len)


def seen(steps):
    return collections.Counter(index for step in steps for row in step.rows for index in row)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_every_example_is_seen_once_an_epoch(packed, epochs, batch_size):
    steps = plan(random_lengths(103, 256), seq_len=256, batch_size=batch_size, packing=packed, epochs=epochs)
    assert seen(steps) == dict.fromkeys(range(103), epochs)
    assert {len(step.rows) for step in steps} == {batch_size}
    assert sum(() in step.rows for step in steps) <= 1  # only the very last step may hold empty rows


def test_leftover_rows_of_an_epoch_join_the_next():
    steps = plan([8] * 10, seq_len=8, batch_size=4, packing=False, epochs=2)
    assert len(steps) == 5
    assert () not in steps[-1].rows


def test_packed_rows_are_full_and_never_too_long(monkeypatch):
    monkeypatch.setattr(packing, "PACKING_WINDOW", 512)
    lengths = random_lengths(3000, 512)
    steps = plan(lengths, seq_len=512, batch_size=4, packing=True, epochs=1)
    sizes = [int(lengths[list(row)].sum()) for step in steps for row in step.rows if row]
    assert max(sizes) <= 512
    assert sum(sizes) / (512 * len(sizes)) > 0.98


def test_best_fit_takes_the_fullest_row_that_has_room():
    # 7 | 6 | then 3 fits both and goes to the 7, and 2 goes to the 6
    assert packing._best_fit([0, 1, 2, 3], np.array([7, 6, 3, 2]), 10) == [(0, 2), (1, 3)]


def test_rows_of_like_length_share_a_step_in_few_shapes():
    lengths = random_lengths(2000, 512)
    steps = plan(lengths, seq_len=512, batch_size=8, packing=False, bucket=32, epochs=1)
    assert {step.length for step in steps} <= {32 * n for n in range(1, 17)}
    assert sum(lengths) / sum(len(step.rows) * step.length for step in steps) > 0.75
    lengths_in_order = [step.length for step in steps[:16]]
    assert lengths_in_order != sorted(lengths_in_order)  # training does not go from short to long
    fine = plan(lengths, seq_len=512, batch_size=8, packing=False, bucket=1, epochs=1)
    assert {step.length for step in fine} <= {32 * n for n in range(1, 17)}


@pytest.mark.parametrize(("longest", "bucket", "length"), [(5, 4, 8), (8, 4, 8), (9, 8, 10), (3, 64, 10)])
def test_rows_are_rounded_up_to_the_bucket_but_not_above_seq_len(longest, bucket, length):
    [step] = plan([2, longest], seq_len=10, batch_size=2, packing=False, bucket=bucket, epochs=1)
    assert step.length == length


@pytest.mark.parametrize("packed", [True, False])
def test_steps_bound_the_run_and_are_a_prefix_of_the_longer_one(packed):
    lengths = random_lengths(50, 128)
    long = plan(lengths, seq_len=128, batch_size=4, packing=packed, steps=40)
    assert len(long) == 40
    assert plan(lengths, seq_len=128, batch_size=4, packing=packed, steps=7) == long[:7]
    assert len(plan(lengths, seq_len=128, batch_size=4, packing=False, epochs=1, steps=1000)) == 13


def test_a_part_of_an_epoch_takes_that_part_of_the_examples():
    assert (
        sorted(seen(plan([4] * 40, seq_len=4, batch_size=4, packing=False, epochs=1.5)).values()) == [1] * 20 + [2] * 20
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("epochs", [0.1, 0.5, 1, 1.5, 2])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_more_epochs_go_on_from_fewer_without_a_row_twice(packed, epochs, batch_size):
    lengths = random_lengths(103, 256)
    short, long = (
        plan(lengths, seq_len=256, batch_size=batch_size, packing=packed, epochs=some) for some in (epochs, 3)
    )
    *before, last = short
    assert before == long[: len(before)]
    rows = [row for row in last.rows if row]
    assert rows == list(long[len(before)].rows[: len(rows)])
    count = sum(row != () for step in long for row in step.rows) / 3
    assert 0 <= sum(row != () for step in short for row in step.rows) - round(epochs * count) < batch_size + 1


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epochs=1):
        steps = plan([8] * 64, seq_len=8, batch_size=64, packing=False, seed=seed, epochs=epochs)
        return [row[0] for step in steps for row in step.rows]

    assert order(1) == order(1)
    assert order(1) != order(2)
    first, second = order(1, epochs=2)[:64], order(1, epochs=2)[64:]
    assert first == order(1)
    assert first != second


def test_the_order_is_pinned_across_platforms_and_versions():
    [step] = plan([4] * 8, seq_len=4, batch_size=8, packing=False, seed=0, epochs=1)
    assert step == Step(((2,), (4,), (3,), (6,), (5,), (0,), (1,), (7,)), 4)


def test_without_shuffling_the_order_stays():
    steps = plan([3, 1, 2, 4, 1], seq_len=4, batch_size=2, packing=False, shuffle=False, epochs=1)
    assert [step.rows for step in steps] == [((0,), (1,)), ((2,), (3,)), ((4,), ())]


def test_all_bad_settings_are_in_one_message():
    with pytest.raises(ValueError) as error:
        plan([3, 9], seq_len=8, batch_size=0, packing=True, bucket=-1)
    for words in ("batch_size: found 0", "bucket: found -1", "neither epochs nor steps", "lengths of 3 to 9 tokens"):
        assert words in str(error.value)
    for endless in ({"steps": 10**20}, {"epochs": float("inf")}, {"epochs": 1e9, "steps": 1 << 40}):
        with pytest.raises(ValueError, match=r"rows in all, expected at most 67,108,864: .* lower its steps or epochs"):
            plan([1], seq_len=8, batch_size=2, packing=True, **endless)
    assert len(plan([1], seq_len=8, batch_size=2, packing=True, epochs=3, steps=1 << 40)) == 2
    with pytest.raises(ValueError, match="found no examples"):
        plan([], seq_len=8, batch_size=1, packing=True, epochs=1)
