"""The score head: the adapter's one leaf without an original, and what it says of hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import lora, models, sharding

SIZES = dict(
    model_type="llama", vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
)


@pytest.fixture(scope="module")
def model():
    return models.build(SIZES)


@pytest.fixture(scope="module")
def base(model):
    return jax.jit(model.random_params)(jax.random.key(0))


def test_the_head_belongs_to_the_adapter(model, base):
    params = model.add_score(base)
    assert params["score"].keys() == {"trained_kernel"} and "score" not in base
    assert params["score"]["trained_kernel"].shape == (24, 1)
    assert params["score"]["trained_kernel"].dtype == jnp.float32
    assert not np.any(params["score"]["trained_kernel"])
    assert lora.split(params)[1].keys() == {"score"}
    assert lora.strip(params).keys() == base.keys()
    assert lora.adapter_leaves(params) == {"score": params["score"]}


def test_a_key_draws_what_transformers_would(model, base):
    config = models.build(SIZES | dict(hidden_size=3000, num_attention_heads=3))
    kernel = config.add_score({}, jax.random.key(1))["score"]["trained_kernel"]
    assert abs(float(jnp.std(kernel)) - 0.02) < 1e-3 and abs(float(jnp.mean(kernel))) < 1e-3
    again = model.add_score(base, jax.random.key(1))["score"]["trained_kernel"]
    np.testing.assert_array_equal(again, model.add_score(base, jax.random.key(1))["score"]["trained_kernel"])


def test_scores_are_a_float32_product(model, base):
    params = model.add_score(base, jax.random.key(1))
    hidden = jax.random.normal(jax.random.key(2), (2, 5, 24)).astype(jnp.bfloat16)
    scores = jax.jit(model.score)(params, hidden)
    assert scores.dtype == jnp.float32 and scores.shape == (2, 5)
    kernel = np.asarray(params["score"]["trained_kernel"])[:, 0]
    np.testing.assert_allclose(scores, np.asarray(hidden, np.float32) @ kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.score(lora.merge(params), hidden), model.score(params, hidden))
    assert lora.merge(params)["score"].keys() == {"kernel"}


def test_a_trained_head_takes_the_place_of_a_base_head(model, base):
    hidden = jax.random.normal(jax.random.key(2), (4, 24))
    first, second = (model.add_score(base, jax.random.key(i))["score"]["trained_kernel"] for i in (1, 2))
    params = base | {"score": {"kernel": first, "trained_kernel": second}}
    expected = model.score(base | {"score": {"kernel": second}}, hidden)
    np.testing.assert_array_equal(model.score(params, hidden), expected)
    np.testing.assert_array_equal(model.score(lora.merge(params), hidden), expected)
    assert np.abs(expected - model.score(base | {"score": {"kernel": first}}, hidden)).max() > 0.01


def test_all_linears_are_not_the_head(model, base):
    params = lora.init(
        base | {"score": {"kernel": jnp.ones((24, 1))}},
        lora.LoraConfig(r=2, target_modules="all-linear"),
        jax.random.key(0),
    )
    assert params["score"].keys() == {"kernel"}


def test_the_head_is_placed_by_the_rules(model, base):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    placed = sharding.shard(model.add_score(base), mesh)["score"]["trained_kernel"]
    assert placed.sharding.spec == jax.sharding.PartitionSpec("fsdp", None)


def test_what_is_missing_is_named(model, base):
    with pytest.raises(ValueError, match="have no score head: add one"):
        model.score(base, jnp.ones((1, 24)))
    with pytest.raises(ValueError, match="have a score head already: trained_kernel"):
        model.add_score(model.add_score(base))
    headless = {name: module for name, module in base.items() if name != "lm_head"}
    with pytest.raises(ValueError, match="lm_head/kernel is not in these params"):
        model.logits(headless, jnp.ones((1, 24)))
