"""The Llama family against transformers, from random weights at awkward sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jlora import models, tree

SIZES = dict(vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=3, max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
CASES = {
    "tied": dict(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True),
    "untied": dict(num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=False),
    "wide_heads": dict(num_attention_heads=3, num_key_value_heads=3, head_dim=20),
    "biases": dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "theta": dict(
        num_attention_heads=4, num_key_value_heads=4, rope_parameters=dict(rope_type="default", rope_theta=1e5)
    ),
    "llama3": dict(num_attention_heads=4, num_key_value_heads=4, rope_parameters=dict(rope_theta=5e5, **LLAMA3)),
    "linear": dict(
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0),
    ),
}


def pair(**overrides):
    """transformers' model with random weights (norms and biases too), and ours with the same."""
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**SIZES, **overrides)).eval()
    with torch.no_grad():
        for name, value in reference.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model = models.build(reference.config.to_dict())
    weights = {name: value.numpy() for name, value in reference.state_dict().items()}
    return (
        reference,
        model,
        tree.map_with_path(lambda path, leaf: jnp.asarray(_read(path, leaf, weights)), model.abstract_params()),
    )


def _read(path, leaf, weights):
    name = (
        path.replace("/", ".")
        .replace(".kernel", ".weight")
        .replace(".scale", ".weight")
        .replace(".embedding", ".weight")
    )
    turn = (lambda value: value.T) if path.endswith("kernel") else (lambda value: value)
    if path.startswith("layers/"):
        layers = [turn(weights[f"model.layers.{i}.{name.removeprefix('layers.')}"]) for i in range(leaf.shape[0])]
        return np.stack(layers)
    return turn(weights[name if path.startswith("lm_head") else f"model.{name}"])


def tokens(batch, length, seed=1):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (batch, length))


def reference_logits(reference, ids, **inputs):
    with torch.no_grad():
        return reference(torch.from_numpy(ids), **inputs).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers(case):
    reference, model, params = pair(**CASES[case])
    ids = tokens(2, 23)
    ours = model(params, jnp.asarray(ids))
    assert ours.dtype == jnp.float32
    expected = reference_logits(reference, ids)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("case", ["tied", "llama3"])
def test_cache_gives_the_same_token_by_token(case):
    _, model, params = pair(**CASES[case])
    ids = jnp.asarray(tokens(2, 11))
    whole = model(params, ids)
    cache = model.empty_cache(params, batch=2, size=16)
    hidden, cache = model.hidden(params, ids[:, :4], cache=cache)
    steps = [hidden]
    for i in range(4, 11):
        hidden, cache = model.hidden(params, ids[:, i : i + 1], jnp.full((2, 1), i), cache=cache)
        steps.append(hidden)
    np.testing.assert_allclose(model.logits(params, jnp.concatenate(steps, axis=1)), whole, rtol=1e-4, atol=1e-4)


def test_packed_documents_do_not_see_each_other():
    _, model, params = pair(**CASES["tied"])
    first, second, other = (jnp.asarray(tokens(1, n, seed=n)) for n in (7, 9, 6))
    positions = jnp.concatenate([jnp.arange(7), jnp.arange(9)])[None]
    segments = jnp.asarray([[1] * 7 + [2] * 9])
    packed = model(params, jnp.concatenate([first, second], axis=1), positions, segments)
    np.testing.assert_allclose(packed[:, :7], model(params, first), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[:, 7:], model(params, second), rtol=1e-4, atol=1e-4)
    changed = model(params, jnp.concatenate([first[:, :1], other, second], axis=1), positions, segments)
    np.testing.assert_array_equal(changed[:, 7:], packed[:, 7:])


def test_left_padding_changes_nothing():
    _, model, params = pair(**CASES["untied"])
    ids = jnp.asarray(tokens(1, 8))
    padded = jnp.pad(ids, ((0, 0), (5, 0)))
    positions = jnp.maximum(jnp.arange(13) - 5, 0)[None]
    segments = jnp.asarray([[0] * 5 + [1] * 8])
    np.testing.assert_allclose(
        model(params, padded, positions, segments)[:, 5:], model(params, ids), rtol=1e-4, atol=1e-4
    )


def test_unsupported_configs_name_the_field():
    good = LlamaConfig(**SIZES, num_attention_heads=4).to_dict()
    with pytest.raises(ValueError, match="model_type 'mamba9' is not supported; expected one of llama"):
        models.build(good | {"model_type": "mamba9"})
    with pytest.raises(ValueError, match="hidden_act 'gelu'"):
        models.build(good | {"hidden_act": "gelu"})
    with pytest.raises(ValueError, match="rope_type 'longrope'"):
        models.build(good | {"rope_parameters": {"rope_type": "longrope"}})
    with pytest.raises(ValueError, match="lacks hidden_size, num_hidden_layers"):
        models.build({k: v for k, v in good.items() if k not in ("hidden_size", "num_hidden_layers")})
