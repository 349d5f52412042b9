"""Rotary embeddings: transformers' frequencies, and that scores depend on distances alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jlora.models.config import Rope
from jlora.models.rope import rope_tables, rotate

SCALED = {
    "default": {},
    "linear": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256),
    "yarn": dict(factor=4.0, original_max_position_embeddings=256),
}
POSITIONS = np.array([[0, 1, 5, 100, 300, 2000]], np.int32)


@pytest.mark.parametrize("kind", SCALED)
def test_tables_are_transformers(kind):
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rope_parameters=dict(rope_type=kind, rope_theta=10000.0) | SCALED[kind],
    )
    embedding = LlamaRotaryEmbedding(config)
    wanted = embedding(torch.zeros(1, 6, 128), torch.from_numpy(POSITIONS).long())
    rope = Rope(64, rope_type=kind, attention_factor=embedding.attention_scaling, **SCALED[kind])
    for ours, expected in zip(rope_tables(rope, jnp.asarray(POSITIONS)), wanted, strict=True):
        np.testing.assert_allclose(ours, expected.numpy(), atol=3e-4)


def test_products_of_turned_vectors_depend_on_the_distance():
    """⟨R(m) q, R(n) k⟩ is that of (m + 7, n + 7), and is R(n - m) applied to k: turned the right way round."""
    rope = Rope(64)
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 64)) for i in range(2))

    def turned(x, position):
        return rotate(x, *rope_tables(rope, jnp.array([[position]], jnp.int32)))[0, 0, 0]

    products = [float(turned(q, m) @ turned(k, n)) for m, n in ((3, 9), (10, 16), (0, 6))]
    np.testing.assert_allclose(products, products[0], rtol=1e-3, atol=1e-3)
    assert abs(float(turned(q, 9) @ turned(k, 3)) - products[0]) > 0.05
    first, second = np.split(np.asarray(k[0, 0, 0], np.float64), 2)
    angles = 6 * 10000.0 ** (-np.arange(0, 64, 2) / 64)
    by_hand = [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    np.testing.assert_allclose(turned(k, 6), np.concatenate(by_hand), atol=1e-4)
