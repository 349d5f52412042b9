"""What a run says of its use of the devices."""

import types

import jax
import jax.numpy as jnp
import pytest

from jlora import lora, models
from jlora.train.planning.cost import cost
from jlora.train.reporting import usage

LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def fake(kind="NVIDIA H100 80GB HBM3", peak=None):
    stats = None if peak is None else {"peak_bytes_in_use": peak}
    return types.SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats)


def test_a_devices_peak_memory_speed_and_share_of_its_arithmetic():
    used = [fake(peak=3 << 30), fake(peak=5 << 30)]
    found = usage.summary(20_000, 2.0, 4.8e10, used=used)
    assert (found.peak_bytes, found.of_process, found.tokens_per_second) == (5 << 30, False, 10_000)
    assert found.mfu == pytest.approx(10_000 * 4.8e10 / (2 * 989.4e12))
    assert str(found) == "10,000 tokens/s, peak memory 5.00 GiB a device, MFU 24.3%"


def test_a_cpu_has_the_growth_of_the_process_and_no_share():
    before = usage.process_peak()
    found = usage.summary(100, 1.0, 1e9, used=jax.devices()[:1], grown_from=before - (7 << 20))
    assert found.of_process and found.mfu is None
    assert 7 << 20 <= found.peak_bytes < 8 << 30
    assert found.numbers() == {"tokens_per_second": 100.0, "peak_bytes": found.peak_bytes}
    assert "of the process" in str(found)


def test_a_device_that_is_not_in_the_table_has_no_share():
    assert usage.summary(1, 1.0, 1e9, used=[fake("NVIDIA T4", 1)]).mfu is None


GEMMA = LLAMA | dict(
    model_type="gemma4_text",
    num_hidden_layers=6,
    layer_types=["sliding_attention", "full_attention"] * 3,
    sliding_window=64,
    head_dim=16,
    global_head_dim=64,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=4096,
    tie_word_embeddings=True,
)
DEEPSEEK = LLAMA | dict(
    model_type="deepseek_v3",
    num_key_value_heads=4,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=64,  # else attention pads values to the width of keys, which does not count
    first_k_dense_replace=2,
)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LLAMA, id="llama"),
        pytest.param(LLAMA | {"tie_word_embeddings": True}, id="tied"),
        pytest.param(GEMMA, id="gemma4_text"),
        pytest.param(DEEPSEEK, id="deepseek_v3"),
    ],
)
def test_flops_are_those_of_the_products_in_a_gradient(config):
    """A tied embedding is the head: the lookup multiplies nothing. Nor do the rows that layers have of their own."""
    model = models.build(config)
    params = lora.init(jax.jit(model.random_params)(jax.random.key(0)), lora.LoraConfig(r=4), jax.random.key(0))
    frozen, trainable = lora.split(params)
    length = 32
    tokens = jnp.zeros((1, length), jnp.int32)

    def loss(trainable):
        params = lora.combine(frozen, trainable)
        return jnp.sum(model.logits(params, model.hidden(params, tokens)[0]) ** 2)

    counted = cost(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr).flops / length
    # What attention computes again in the backward pass is in the one and not in the other.
    assert usage.flops_per_token(model.config, frozen, trainable, length) == pytest.approx(counted, rel=0.1)
