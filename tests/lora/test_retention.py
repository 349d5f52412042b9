"""What merges keep of an update: everything in float32, next to nothing of a small one in 4 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import lora, quant


def module(share, dtype=jnp.float32):
    """A layer's kernel with an update of `share` of its norm."""
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = 0.02 * jax.random.normal(keys[0], (2, 256, 192))
    lora_a, lora_b = jax.random.normal(keys[1], (2, 256, 8)), jax.random.normal(keys[2], (2, 8, 192))
    size = jnp.linalg.norm(kernel) / jnp.linalg.norm(lora_a @ lora_b)
    leaves = {
        "kernel": kernel.astype(dtype),
        "lora_a": lora_a,
        "lora_b": lora_b,
        "lora_scale": jnp.full(2, share * size),
    }
    return {"layers": {"up_proj": leaves, "norm": {"scale": jnp.ones((2, 4))}}}


def test_a_float32_merge_keeps_everything_and_rounding_shows():
    found = lora.kept(module(0.01), lora.merge(module(0.01)))
    assert found.fraction == pytest.approx(1, abs=1e-5) and found.error < 1e-4
    rounded = lora.kept(module(0.01, jnp.bfloat16), lora.merge(module(0.01, jnp.bfloat16)))
    assert rounded.fraction == pytest.approx(1, abs=0.02) and 0.05 < rounded.error < 0.5
    assert str(rounded).splitlines()[2].startswith("layers/up_proj/kernel")


def test_layers_are_compared_however_they_are_stacked():
    params = module(0.01, jnp.bfloat16)
    merged = lora.merge(params)
    layers = params.pop("layers")
    apart = {f"layers@{i}-{i}": jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], layers) for i in range(2)}
    found, expected = lora.kept(apart, merged), lora.kept({"layers": layers}, merged)
    assert len(found.modules) == 2 and found.fraction != 1
    assert (found.fraction, found.error) == pytest.approx((expected.fraction, expected.error), rel=1e-6)
    with pytest.raises(ValueError, match=r"layers/up_proj/kernel of layer 1 \(256, 192\): found nothing"):
        lora.kept({"layers": layers}, {"layers@0-0": jax.tree.map(lambda leaf: leaf[:1], merged["layers"])})


def test_copies_biases_and_rows_count_as_well():
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def draw(*shape):
        return jax.random.normal(next(keys), shape)

    params = {
        "embed_tokens": {"embedding": draw(9, 4), "lora_tokens": draw(2, 4), "lora_token_ids": jnp.array([3, 7])},
        "layers": {
            "up_proj": {"kernel": draw(2, 4, 6), "trained_kernel": draw(2, 4, 6)},
            "down_proj": {
                "kernel": draw(2, 6, 4),
                "lora_a": draw(2, 6, 1),
                "lora_b": draw(2, 1, 4),
                "lora_bias": draw(2, 4),
                "lora_scale": jnp.ones(2),
            },
            "norm": {"scale": draw(2, 4), "trained_scale": draw(2, 4)},
        },
    }
    merged = lora.merge(params)
    found = lora.kept(params, merged)
    assert [module.path for module in found.modules] == [
        "embed_tokens/embedding",
        "layers/down_proj/bias",
        "layers/down_proj/kernel",
        "layers/norm/scale",
        "layers/up_proj/kernel",
    ]
    assert found.fraction == pytest.approx(1, abs=1e-6) and found.error < 1e-6
    merged["layers"]["up_proj"]["kernel"] = params["layers"]["up_proj"]["kernel"]
    lost = lora.kept(params, merged)
    assert lost.fraction < 0.8 and lost.modules[-1].along == 0 and lost.modules[-1].energy > 1


def test_of_a_merge_aware_kernel_the_packed_sum_is_kept():
    params = module(0.05)
    params["layers"]["up_proj"]["kernel"] = quant.Rounded(params["layers"]["up_proj"]["kernel"], "nf4", True)
    found = lora.kept(params, lora.merge(params))
    assert found.fraction == pytest.approx(1, abs=1e-6) and found.error < 1e-6


@pytest.mark.parametrize(
    ("share", "least", "most"), [(0.002, 0, 0.05), (0.01, 0, 0.05), (0.05, 0.1, 0.5), (0.1, 0.6, 1)]
)
def test_packing_the_sum_erases_small_updates(share, least, most):
    params = module(share)
    base = quant.dequantize(quant.quantize(params["layers"]["up_proj"]["kernel"], double_quant=False))
    params["layers"]["up_proj"]["kernel"] = base  # what an adapter is trained on
    merged = lora.merge(params)
    merged["layers"]["up_proj"]["kernel"] = quant.quantize(merged["layers"]["up_proj"]["kernel"], double_quant=False)
    found = lora.kept(params, merged)
    changed = np.asarray(quant.dequantize(merged["layers"]["up_proj"]["kernel"]) - base, np.float64)
    leaves = params["layers"]["up_proj"]
    update = np.asarray(leaves["lora_a"] @ leaves["lora_b"] * leaves["lora_scale"][:, None, None], np.float64)
    assert found.fraction == pytest.approx((changed * update).sum() / (update**2).sum(), rel=1e-3)
    assert found.error == pytest.approx(np.linalg.norm(changed - update) / np.linalg.norm(update), rel=1e-3)
    assert least < found.fraction < most
