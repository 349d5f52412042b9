"""What layers keep of earlier tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import models
from jlora.errors import UserError
from jlora.models.cache import Cache, Shape

GEMMA = dict(
    model_type="gemma4_text",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    global_head_dim=20,
    layer_types=["sliding_attention", "full_attention"] * 3,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=10,
    vocab_size_per_layer_input=101,
)


def test_layers_that_take_the_keys_of_others_keep_none():
    model = models.build(GEMMA)
    cache = jax.eval_shape(lambda params: model.empty_cache(params, 3, 7), model.abstract_params())
    shapes = {name: arrays["keys"].shape for name, arrays in cache.stacks.items()}
    assert shapes == {"attention 2x12": (2, 3, 2, 7, 12), "attention 2x20": (2, 3, 2, 7, 20)}


def test_tokens_for_which_layers_have_no_rows_are_refused():
    with pytest.raises(UserError, match="vocab_size_per_layer_input 99: layers have no input of their own"):
        models.build(GEMMA | {"vocab_size_per_layer_input": 99})


ROOM = {"some": (2, {"keys": Shape((3, None, 4)), "state": Shape((5,))})}  # of 2 layers; 3 heads, 4 wide
LENGTHS = [0, 3, 5, 6, 7, 9]  # in a cache of 7 places


def filled(lengths):
    """A cache of as many rows, with a number of its own in every place."""
    cache = Cache.empty(ROOM, len(lengths), 7, jnp.float32)
    stacks = jax.tree.map(lambda kept: jnp.arange(1.0, kept.size + 1).reshape(kept.shape), cache.stacks)
    return Cache(stacks, cache.positions, cache.segment_ids, jnp.asarray(lengths, jnp.int32))


@pytest.mark.parametrize("tokens", [1, 2, 4, 9])
def test_rows_of_different_lengths_are_written_where_each_ends_and_nowhere_beyond_the_room(tokens):
    cache = filled(LENGTHS)
    new = -jnp.arange(1.0, len(LENGTHS) * tokens * 3 * 4 + 1).reshape(len(LENGTHS), tokens, 3, 4)
    extended, read = jax.jit(lambda cache, layer: cache.extend("some", layer, {"keys": new}))(cache, jnp.int32(1))
    expected = np.array(cache.stacks["some"]["keys"])
    for row, length in enumerate(LENGTHS):
        for token, column in enumerate(range(length, min(length + tokens, 7))):
            expected[1, row, :, column] = new[row, token]
    np.testing.assert_array_equal(extended.stacks["some"]["keys"], expected)
    np.testing.assert_array_equal(read["keys"], expected[1].swapaxes(1, 2))


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_a_view_writes_to_its_rows_and_to_no_others(tokens):
    whole, rows, starts = filled([2, 1, 0, 4]), [3, 0, 9], [4, 5, 0]  # there is no row 9
    view = whole.view(jnp.asarray(rows), jnp.asarray(starts))
    marks = jnp.full((3, tokens), 8), jnp.ones((3, tokens), jnp.int32)
    new = -jnp.arange(1.0, 3 * tokens * 3 * 4 + 1).reshape(3, tokens, 3, 4)
    state = -jnp.ones((3, 5))
    view, read = view.mark(*marks).extend("some", jnp.int32(0), {"keys": new})
    view = view.with_state("some", jnp.int32(0), {"state": state})
    np.testing.assert_array_equal(view.state("some", jnp.int32(0))["state"][:2], state[:2])
    expected = jax.tree.map(np.array, whole.stacks["some"])
    positions = np.array(whole.positions)
    for number, row in enumerate(rows[:2]):
        expected["state"][0, row] = -1
        for token, column in enumerate(range(starts[number], min(starts[number] + tokens, 7))):
            expected["keys"][0, row, :, column] = new[number, token]
            positions[row, column] = 8
    np.testing.assert_array_equal(read["keys"][:2], expected["keys"][0, rows[:2]].swapaxes(1, 2))
    found = whole.with_view(view)
    jax.tree.map(np.testing.assert_array_equal, found.stacks["some"], expected)
    np.testing.assert_array_equal(found.positions, positions)
    np.testing.assert_array_equal(found.length, [5, 1, 0, 4])
