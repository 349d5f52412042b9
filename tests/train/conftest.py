"""A random Llama whose kernels divide over a mesh, packed blocks included."""

import pytest


@pytest.fixture(scope="session")
def model_folder(make_llama):
    return make_llama(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=48)
