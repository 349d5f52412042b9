"""Dynamic fine-tuning against TRL's trainer and its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import trl

from jlora.losses import cross_entropy, dft

RECORDS = [
    {"prompt": "ab", "completion": "g95fu"},
    {"prompt": "jklmno", "completion": "7dg"},
    {"prompt": "xyz", "completion": "lvg9"},
]


@pytest.mark.parametrize("total", [None, 40])
def test_dft(total, make_trainer, documents_of, ours, agree):
    """The mean over the batch's trained tokens, or over those of all batches that a step accumulates."""
    settings = dict(loss_type="dft", per_device_train_batch_size=3)
    trainer = make_trainer(trl.SFTTrainer, trl.SFTConfig, RECORDS, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    documents = documents_of(batch["input_ids"], batch["attention_mask"], batch["labels"] != -100, range(3))

    def objective(log_probs, reference, batch):
        weights = batch["weights"]
        return jnp.sum(dft(-log_probs) * weights) / (total or jnp.sum(weights))

    found = [ours.loss(objective, ours.rows(documents, 3)[0])]
    items = total and torch.tensor(total)
    agree("DFT", trainer, lambda: trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items), found)


def logits_and_targets():
    keys = jax.random.split(jax.random.key(0), 3)
    logits = 3 * jax.random.normal(keys[0], (2, 9, 31))
    targets = jax.random.randint(keys[1], (2, 9), 0, 31)
    return logits, targets, jax.random.bernoulli(keys[2], 0.6, (2, 9)).astype(jnp.float32)


@pytest.mark.parametrize("chunk", [4, 100])
def test_the_gradient_is_that_of_minus_the_probability(chunk):
    logits, targets, weights = logits_and_targets()

    def ours(logits):
        return cross_entropy(lambda head, hidden: hidden, {}, logits, targets, weights, term=dft, chunk=chunk).loss

    def probability(logits):
        chosen = jnp.take_along_axis(jax.nn.softmax(logits), targets[..., None], axis=-1)[..., 0]
        return jnp.sum(chosen * weights), jnp.sum(chosen * jnp.log(chosen) * weights)

    value, gradient = jax.value_and_grad(ours)(logits)
    (_, expected), of_probability = jax.value_and_grad(probability, has_aux=True)(logits)
    np.testing.assert_allclose(value, -expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, -of_probability, rtol=1e-4, atol=1e-7)
    assert not np.any(np.asarray(gradient)[np.asarray(weights) == 0]) and np.any(gradient)


def test_a_token_that_cannot_be_counts_for_nothing():
    value, gradient = jax.value_and_grad(dft)(jnp.float32(200.0))
    assert value == 0 and gradient == 0
