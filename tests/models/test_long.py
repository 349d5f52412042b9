"""Long rows: the loss and gradients of training in blocks are those of the plain form, and those of short rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import lora, models
from jlora.train.algorithms.sft import sft_loss

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}
LONG = pytest.param(32768, marks=pytest.mark.slow)  # two documents; the plain form has 10⁹ scores of them


@pytest.fixture(scope="module")
def halves():
    model = models.build(CONFIG)
    params = lora.init(
        jax.jit(model.random_params)(jax.random.key(0)),
        lora.LoraConfig(r=2, target_modules="all-linear"),
        jax.random.key(1),
    )
    frozen, trainable = lora.split(params)
    return model, frozen, jax.tree.map(lambda leaf: leaf + 0.1, trainable)


def batch_of(documents):
    """One row that holds documents of these lengths, every token trained; the tokens are each document's own."""
    parts = [np.random.default_rng(number).integers(0, 40, length) for number, length in enumerate(documents)]
    batch = {
        "tokens": np.concatenate(parts),
        "targets": np.concatenate([np.roll(part, -1) for part in parts]),
        "weights": np.ones(sum(documents), np.float32),
        "positions": np.concatenate([np.arange(length) for length in documents]),
        "segment_ids": np.repeat(np.arange(1, len(documents) + 1), documents),
    }
    return {name: jnp.asarray(leaf)[None].astype(leaf.dtype.name.replace("64", "32")) for name, leaf in batch.items()}


@functools.partial(jax.jit, static_argnums=0)
def _gradients(model, frozen, trainable, batch):
    """Of the loss summed over the tokens, which adds up over rows."""
    objective = sft_loss(model, remat="full")
    loss = lambda trainable: objective.loss(trainable, frozen, batch, {"tokens": jnp.float32(1)}, None)[0]  # noqa: E731
    return jax.value_and_grad(loss)(trainable)


def gradients(halves, form, documents):
    model, frozen, trainable = halves
    return _gradients(dataclasses.replace(model, attention=form), frozen, trainable, batch_of(documents))


def close(ours, theirs):
    """To rounding: of float32 sums over thousands of tokens, relative to the largest of each leaf."""

    def near(one, two):
        np.testing.assert_allclose(one, two, rtol=0, atol=2e-5 * max(1e-3, float(jnp.max(jnp.abs(two)))))

    jax.tree.map(near, ours, theirs)


@pytest.mark.parametrize("tokens", [1500, LONG])
def test_training_in_blocks_equals_the_plain_form(halves, tokens):
    documents = (2 * tokens // 3, tokens - 2 * tokens // 3)
    close(gradients(halves, "blocked", documents), gradients(halves, "plain", documents))


@pytest.mark.parametrize("tokens", [1500, LONG])
def test_a_long_row_of_documents_equals_a_row_for_each(halves, tokens):
    documents = (tokens // 2, tokens - tokens // 2)
    packed = gradients(halves, "blocked", documents)
    model, frozen, trainable = halves
    rows = batch_of(documents)
    alone = []
    for number in (1, 2):
        own = np.asarray(rows["segment_ids"][0]) == number
        row = {name: leaf[:, own] for name, leaf in rows.items()}
        alone.append(_gradients(dataclasses.replace(model, attention="blocked"), frozen, trainable, row))
    close(packed, jax.tree.map(jnp.add, *alone))
