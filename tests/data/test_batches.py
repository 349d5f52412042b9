"""The loader: no token of one document reaches another, and a resumed run sees the same batches."""

import json

import numpy as np
import pytest

from jlora.data import Example, Item, Step, collate, loader, plan


def example(tokens, trained):
    return Example(np.array(tokens, np.int32), np.array(trained, np.bool_))


def random_examples(count, seed=0):
    generator = np.random.Generator(np.random.PCG64(seed))
    lengths = generator.integers(2, 30, count)
    return [example(generator.integers(1, 99, n), generator.integers(0, 2, n)) for n in lengths]


def make_steps(examples, **settings):
    return plan([len(e.tokens) for e in examples], seq_len=32, bucket=8, packing=True, **settings)


def test_a_row_of_two_documents_drawn_out():
    documents = [example([5, 6, 7], [0, 0, 1]), example([8, 9], [1, 1])]
    batch = collate(documents, Step(((0, 1), ()), 6))
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "weights": "float32",
        "positions": "int32",
        "segment_ids": "int32",
    }
    expected = {
        "tokens": [5, 6, 7, 8, 9, 0],
        "targets": [6, 7, 0, 9, 0, 0],
        "weights": [0, 1, 0, 1, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0],
        "segment_ids": [1, 1, 1, 2, 2, 0],
    }
    for name, row in expected.items():
        assert batch[name].tolist() == [[row, [0] * 6]], name


def test_packing_keeps_every_document_whole_and_targets_inside_it():
    examples = random_examples(40)
    steps = make_steps(examples, batch_size=4, epochs=1)
    weights = 0.0
    for step in steps:
        batch = collate(examples, step, grad_accum=2)
        assert batch["tokens"].shape == (2, 2, step.length)
        rows = {name: array.reshape(4, -1) for name, array in batch.items()}
        weights += rows["weights"].sum()
        for row, indices in enumerate(step.rows):
            for segment, index in enumerate(indices, start=1):
                inside = rows["segment_ids"][row] == segment
                tokens = examples[index].tokens
                np.testing.assert_array_equal(rows["tokens"][row][inside], tokens)
                np.testing.assert_array_equal(rows["positions"][row][inside], np.arange(len(tokens)))
                np.testing.assert_array_equal(rows["targets"][row][inside], np.append(tokens[1:], 0))
                assert rows["weights"][row][inside][-1] == 0
    assert weights == sum(e.trained[1:].sum() for e in examples)


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_resumed_iterator_yields_what_the_uninterrupted_one_would(stop):
    examples = random_examples(40)
    steps = make_steps(examples, batch_size=4, steps=9)
    items = [Item((one,)) for one in examples]
    whole = list(loader(items, steps, 2, by_item=False))
    assert len(whole) == 9
    first = loader(items, steps, 2, by_item=False)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))  # it is written to disk as JSON
    resumed = loader(items, steps, 2, by_item=False)
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == 9 - stop
    for expected, found in zip(whole[stop:], rest, strict=True):
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_rows_must_split_into_the_micro_batches():
    with pytest.raises(ValueError, match=r"found steps of \[3\] rows, expected a multiple of grad_accum=2"):
        loader([Item((one,)) for one in random_examples(3)], [Step(((0,), (1,), (2,)), 32)], 2)
