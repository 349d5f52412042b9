"""What users are told of how their weights are kept."""

import jax.numpy as jnp

from jlora import quant

DENSE = {"layers": {"self_attn": {"q_proj": {"kernel": jnp.zeros((2, 64, 32), jnp.bfloat16)}}}}


def with_experts(kernel):
    return {"layers": DENSE["layers"] | {"mlp": {"experts": {"down_proj": {"kernel": kernel}}}}}


def test_a_dense_model_that_is_not_packed_needs_no_words():
    assert quant.kept_in(DENSE) == ""


def test_shares_and_bytes_by_kind():
    kernel = jnp.zeros((2, 6, 64, 32), jnp.bfloat16)
    found = quant.kept_in(with_experts(quant.quantize(kernel, "mxfp4")))
    assert found == "experts 85.7% in mxfp4 (12.8 KiB), others 14.3% in bfloat16 (8.0 KiB)"
    alone = {"layers": {"self_attn": {"q_proj": {"kernel": quant.quantize(jnp.zeros((2, 64, 32)), "nf4")}}}}
    assert quant.kept_in(alone) == "weights 100.0% in nf4 (2.1 KiB)"


def test_experts_that_stay_wide_are_said_to():
    kernel = jnp.zeros((2, 6, 64, 32), jnp.bfloat16)
    mixed = with_experts(kernel)
    assert quant.kept_in(mixed).endswith("nothing is packed")
    mixed["layers"] |= {"self_attn": {"q_proj": {"kernel": quant.quantize(jnp.zeros((2, 64, 32)), "nf4")}}}
    assert quant.kept_in(mixed).endswith("others 14.3% in nf4 (2.1 KiB), the experts are not packed")
