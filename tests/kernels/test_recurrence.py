"""Recurrences and convolutions: every form against transformers' and against each document by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as judge

from jlora import sharding
from jlora.errors import UserError
from jlora.kernels.recurrence import FORMS, Runs, chunked, convolve, last_segment, recur
from jlora.types import BRANCH

HEADS, GROUPS, WIDTH, VALUES = 2, 3, 8, 12
run = jax.jit(recur, static_argnames="form")


def inputs(tokens, batch=2, seed=0):
    """Queries, keys, values, decays, rates and a state."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    keys = draw(2, batch, tokens, HEADS, WIDTH)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values = draw(batch, tokens, HEADS * GROUPS, VALUES)
    decays = -np.logaddexp(0, 2 * draw(*values.shape[:3]))
    rates = 1 / (1 + np.exp(-draw(*values.shape[:3])))
    return *keys, values, decays, rates, draw(batch, HEADS * GROUPS, WIDTH, VALUES)


def one_run(batch, tokens, branches=False):
    return Runs.of(jnp.ones((batch, tokens), jnp.int32), jnp.ones(batch, jnp.int32), branches)


def by_torch(function, queries, keys, values, decays, rates, state):
    """transformers' function, which divides queries by a root."""
    arrays = queries * WIDTH**0.5, keys, values, decays, rates
    return function(*arrays, initial_state=state, output_final_state=True)


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_transformers_does(form, tokens):
    *arrays, state = inputs(tokens)
    found = run(*arrays, one_run(2, tokens), state, form=form)
    for function in (judge.torch_recurrent_gated_delta_rule, judge.torch_chunk_gated_delta_rule):
        expected = by_torch(function, *map(torch.tensor, arrays), torch.tensor(state))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_gradients_are_those_of_torch(monkeypatch):
    monkeypatch.setattr(chunked, "GROUP", 1 << 16)  # several groups of several chunks
    arrays = inputs(300)
    weights = [np.random.default_rng(9).normal(size=x.shape).astype(np.float32) for x in (arrays[2], arrays[5])]

    def loss(arrays, form):
        *arrays, state = arrays
        found = recur(*arrays, one_run(2, 300), state, form)
        return sum(jnp.sum(x * w) for x, w in zip(found, weights, strict=True))

    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    outputs = by_torch(judge.torch_recurrent_gated_delta_rule, *tensors)
    sum((x * torch.tensor(w)).sum() for x, w in zip(outputs, weights, strict=True)).backward()
    for form in FORMS:
        grads = jax.jit(jax.grad(functools.partial(loss, form=form)))(arrays)
        for grad, tensor in zip(grads, tensors, strict=True):
            scale = np.abs(tensor.grad.numpy()).max()
            np.testing.assert_allclose(grad / scale, tensor.grad.numpy() / scale, atol=2e-6)


# Segments of two rows, with padding before, between and after documents, and branches of a shared start; 163 tokens.
ROWS = np.array(
    [
        [0] * 3 + [1] * 70 + [2] * 1 + [0] * 2 + [3] * 13 + [3 + BRANCH] * 20 + [3 + 2 * BRANCH] * 40 + [0] * 14,
        [1] * 9 + [1 + BRANCH] * 6 + [1 + 2 * BRANCH] * 90 + [2 + BRANCH] * 4 + [2 + 2 * BRANCH] * 50 + [3] * 4,
    ],
    np.int32,
)
PACKED = np.where(ROWS >= BRANCH, 10 + ROWS // BRANCH + ROWS % BRANCH, ROWS)  # branches as documents of their own


def documents(segments):
    """(row, places, how many of them are shared) of every document; a branch shares the segment it branches off."""
    for row, ids in enumerate(segments):
        for segment in np.unique(ids[ids > 0]):
            own = np.flatnonzero(ids == segment)
            shared = np.flatnonzero(ids == segment % BRANCH) if segment >= BRANCH else own[:0]
            yield row, np.concatenate([shared, own]), len(shared)


def alone(function, segments):
    """What `function` makes of each document by itself, put where its tokens are."""
    found = None
    for row, places, shared in documents(segments):
        y = np.asarray(function(row, places))[0, shared:]
        found = np.zeros((*segments.shape, *y.shape[1:]), np.float32) if found is None else found
        found[row, places[shared:]] = y
    return found


@pytest.mark.parametrize("segments", [ROWS, PACKED], ids=["branches", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_a_document_is_computed_as_if_alone(form, segments, monkeypatch):
    monkeypatch.setattr(chunked, "GROUP", 1 << 15)
    arrays = inputs(segments.shape[1])[:5]
    runs = Runs.of(jnp.asarray(segments), branches=bool(np.any(segments >= BRANCH)))
    y, state = run(*arrays, runs, form=form)

    def by_torch_alone(row, places):
        return by_torch(
            judge.torch_recurrent_gated_delta_rule, *(torch.tensor(x[[row]][:, places]) for x in arrays), None
        )

    np.testing.assert_allclose(y, alone(lambda *place: by_torch_alone(*place)[0], segments), atol=1e-5)
    last = last_segment(jnp.asarray(segments))
    for row, places, _ in documents(segments):
        if segments[row, places[-1]] == last[row]:
            np.testing.assert_allclose(state[row], by_torch_alone(row, places)[1][0], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_not_a_bit_changes_with_the_neighbours(form):
    arrays = inputs(ROWS.shape[1])[:5]
    others = inputs(ROWS.shape[1], seed=1)[:5]
    runs = Runs.of(jnp.asarray(ROWS))
    weights = np.random.default_rng(2).normal(size=arrays[2].shape).astype(np.float32)

    @jax.jit
    def values_and_gradients(arrays, mask):
        y, pull = jax.vjp(lambda *arrays: recur(*arrays, runs, form=form)[0], *arrays)
        return y, pull(weights * mask[..., None, None])

    for ids in ((1, 3 + 2 * BRANCH), (2 + 2 * BRANCH, 1 + BRANCH)):
        for row, segment in enumerate(ids):
            kept = segment == ROWS
            if segment >= BRANCH:
                kept |= segment % BRANCH == ROWS
            kept &= np.arange(2)[:, None] == row
            mask = (segment == ROWS) & kept
            mixed = [
                np.where(kept.reshape(kept.shape + (1,) * (x.ndim - 2)), x, z)
                for x, z in zip(arrays, others, strict=True)
            ]
            (y, grads), (z, others_grads) = (values_and_gradients(x, mask.astype(np.float32)) for x in (arrays, mixed))
            np.testing.assert_array_equal(y[mask], z[mask])
            for one, other in zip(grads, others_grads, strict=True):
                np.testing.assert_array_equal(one[kept], other[kept])
                np.testing.assert_array_equal(one[~kept], 0)


def test_calls_follow_each_other_token_by_token():
    """Rows of different lengths, padded on the left and, later, on the right."""
    *arrays, _ = inputs(90)
    segments = np.where(np.arange(90)[None] >= np.array([[0], [23]]), 1, 0).astype(np.int32)
    expected, last = run(*arrays, Runs.of(jnp.asarray(segments)))
    state = jnp.zeros_like(last)
    for start, end in [(0, 70), (70, 71), (71, 72), (72, 90)]:
        ids = np.pad(segments[:, start:end], [(0, 0), (0, 2)])
        runs = (
            Runs.of(jnp.asarray(ids), last_segment(jnp.asarray(segments[:, :start])))
            if start
            else Runs.of(jnp.asarray(ids))
        )
        y, state = run(
            *(np.pad(x[:, start:end], [(0, 0), (0, 2)] + [(0, 0)] * (x.ndim - 2)) for x in arrays), runs, state
        )
        np.testing.assert_allclose(y[:, :-2], expected[:, start:end], atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_without_rates_every_token_is_written_as_it_is(form):
    queries, keys, values, decays, _, state = inputs(100)
    y, last = run(queries, keys, values, decays, None, one_run(2, 100), state, form=form)
    for token in range(100):
        key, query = (np.repeat(x[:, token], GROUPS, axis=1) for x in (keys, queries))
        state = state * np.exp(decays[:, token])[..., None, None] + key[..., None] * values[:, token, :, None]
        np.testing.assert_allclose(y[:, token], np.einsum("bhf,bhfv->bhv", query, state), atol=1e-5)
    np.testing.assert_allclose(last, state, atol=1e-5)


def test_equal_keys_lose_no_digits():
    """A chunk of one word, over and over: powers of its matrix have entries of 1e18."""
    queries, keys, values, decays, rates, state = inputs(64)
    arrays = queries, np.broadcast_to(keys[:, :1], keys.shape), values, 0 * decays, 0 * rates + 0.99, state
    runs = one_run(2, 64)
    for one, other in zip(*(run(*arrays[:5], runs, state, form=form) for form in FORMS), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_sixteen_bits_stay_near():
    *arrays, state = inputs(200)
    expected = run(*arrays, one_run(2, 200), state)[0]
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]]
    y, last = run(*narrow, *arrays[3:], one_run(2, 200), state)
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.abs(y.astype(jnp.float32) - expected).max() < 0.02 * np.abs(expected).max()


def residuals(tokens):
    """Bytes of what the backward pass keeps, inputs aside."""
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs(tokens, batch=1)]
    function = lambda *arrays: recur(*arrays[:5], one_run(1, tokens), arrays[5], "chunked")  # noqa: E731
    _, pull = jax.eval_shape(lambda *arrays: jax.vjp(function, *arrays), *arrays)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))


def test_memory_of_the_backward_pass_grows_with_the_length_and_holds_no_state_of_a_token():
    small, large = residuals(4096), residuals(16384)
    assert large < 4.2 * small
    states = 16384 * HEADS * GROUPS * WIDTH * VALUES * 4
    given = 16384 * (2 * HEADS * WIDTH + HEADS * GROUPS * (VALUES + 2)) * 4
    assert large < 1.5 * given < states


@pytest.mark.parametrize("mesh", [{"sequence": 2, "tensor": 2}, {"fsdp": 2, "sequence": 2}])
def test_a_mesh_changes_nothing(mesh):
    *arrays, _ = inputs(96)
    segments = jnp.asarray(ROWS[:, :96])
    expected = run(*arrays, Runs.of(segments), None)
    with sharding.on(sharding.make_mesh(sharding.MeshConfig(**mesh), jax.devices()[:4])):
        found = jax.jit(lambda *arrays: recur(*arrays, Runs.of(segments)))(*arrays)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_an_unknown_form_is_named():
    with pytest.raises(UserError, match="'fast'; expected one of auto, plain, chunked"):
        run(*inputs(3)[:5], one_run(2, 3), form="fast")


def test_runs_are_drawn():
    ids = jnp.array([[0, 1, 1, 0, 1, 2 + BRANCH, 3, 3 + BRANCH, 3 + 2 * BRANCH, 3 + 2 * BRANCH, 4, 0]])
    runs = Runs.of(ids, jnp.array([1]))
    drawn = {
        "run": [0, 1, 1, 0, 1, 2, 3, 4, 5, 5, 6, 0],
        "trunk": [-1, -1, -1, -1, -1, -1, -1, 3, 3, 3, -1, -1],
        "before": [-1, -1, 1, 2, 2, -2, -2, 6, 6, 8, -2, 10],
        "starts": [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0],
    }
    for name, row in drawn.items():
        np.testing.assert_array_equal(getattr(runs, name)[0], row, err_msg=name)


def convolution(rows, tokens, width=4, channels=5, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=shape).astype(np.float32)
        for shape in [(rows, tokens, channels), (width, channels), (channels,)]
    ]


def by_numpy(x, kernel, bias):
    """The convolution of one document [1, T, D]."""
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    return sum(padded[:, i : i + x.shape[1]] * kernel[i] for i in range(len(kernel))) + bias


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("segments", [ROWS, PACKED], ids=["branches", "packed"])
def test_convolutions_end_with_their_document(segments, width):
    x, kernel, bias = convolution(*segments.shape, width)
    runs = Runs.of(jnp.asarray(segments), branches=bool(np.any(segments >= BRANCH)))
    y, tail = jax.jit(convolve)(x, kernel, runs, bias)
    expected = alone(lambda row, places: by_numpy(x[[row]][:, places], kernel, bias), segments)
    np.testing.assert_allclose(np.where(segments[..., None] > 0, y, 0), expected, atol=1e-5)
    for row, places, _ in documents(segments):
        if segments[row, places[-1]] == last_segment(jnp.asarray(segments))[row]:
            ends = np.pad(x[row, places], [(width, 0), (0, 0)])[-width + 1 :]
            np.testing.assert_array_equal(tail[row], ends)


def test_convolutions_follow_each_other_token_by_token():
    """A row with padding before its start has fewer tokens than the tail, or none at all."""
    x, kernel, bias = convolution(2, 20)
    segments = np.where(np.arange(20)[None] >= np.array([[0], [5]]), 1, 0).astype(np.int32)
    expected, last = jax.jit(convolve)(x, kernel, Runs.of(jnp.asarray(segments)), bias)
    tail = None
    for start, end in [(0, 2), (2, 6), (6, 7), (7, 20)]:
        previous = last_segment(jnp.asarray(segments[:, :start])) if start else None
        runs = Runs.of(jnp.asarray(np.pad(segments[:, start:end], [(0, 0), (0, 1)])), previous)
        y, tail = jax.jit(convolve)(jnp.pad(x[:, start:end], [(0, 0), (0, 1), (0, 0)]), kernel, runs, bias, tail)
        real = segments[:, start:end] > 0
        np.testing.assert_allclose(y[:, :-1][real], expected[:, start:end][real], atol=1e-6)
    np.testing.assert_array_equal(tail, last)


def test_a_convolution_of_one_token_is_an_error():
    x, kernel, _ = convolution(1, 3, width=1)
    with pytest.raises(UserError, match="width 1; expected at least 2"):
        jax.jit(convolve)(x, kernel, one_run(1, 3))
