"""What layers keep of earlier tokens."""

import jax
import pytest

from jlora import models
from jlora.errors import UserError

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
