"""linear: base, packing and adapter in one place, against the written-out formula and PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jlora import lora, quant
from jlora.lora.linears import merged, update


def module(inputs=64, outputs=24, rank=3, packed=False, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    kernel = jax.random.normal(keys[0], (inputs, outputs)) * 0.1
    return {
        "kernel": quant.quantize(kernel) if packed else kernel,
        "bias": jax.random.normal(keys[1], (outputs,)),
        "lora_a": jax.random.normal(keys[2], (inputs, rank)),
        "lora_b": jax.random.normal(keys[3], (rank, outputs)),
        "lora_scale": jnp.float32(0.25),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [5, 301])
def test_values_and_gradients_are_the_formulas(packed, rows):
    m = module(packed=packed)
    x = jax.random.normal(jax.random.key(9), (2, rows, 64))
    weights = jax.random.normal(jax.random.key(10), (2, rows, 24))
    frozen, trainable = lora.split(m)
    dense = quant.dequantize(m["kernel"]) if packed else m["kernel"]

    def ours(x, trainable):
        return jnp.sum(weights * lora.linear(x, lora.combine(frozen, trainable)))

    def formula(x, t):
        y = x @ (dense + 0.25 * t["lora_a"] @ t["lora_b"]) + m["bias"].reshape(1, 1, -1)
        return jnp.sum(weights * y)

    value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, trainable)
    expected, expected_grads = jax.value_and_grad(formula, argnums=(0, 1))(x, trainable)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), grads, expected_grads)
    without = lora.linear(x, lora.strip(m))
    assert np.abs(lora.linear(x, m) - without).max() > 0.1


@pytest.mark.parametrize("packed", [False, True])
def test_merged_is_the_factored_sum(packed):
    """The form for many rows, against the two products that define it; all gradients but a packed kernel's."""
    m = module(packed=packed) | {"lora_scale": jnp.float32(-0.7)}
    x = jax.random.normal(jax.random.key(9), (2, 33, 64))
    weights = jax.random.normal(jax.random.key(10), (2, 33, 24))
    del m["bias"]
    frozen = {"kernel": m.pop("kernel")} if packed else {}

    def twin(x, module):
        return quant.matmul(x, module["kernel"]) + update(x, module)

    def run(form):
        return jax.value_and_grad(lambda x, m: jnp.sum(weights * form(x, m | frozen)), argnums=(0, 1))(x, m)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), run(merged), run(twin))


def test_many_float32_rows_are_merged_and_few_are_not():
    m = module(inputs=64, outputs=24)

    def products(x):
        return str(jax.make_jaxpr(lambda x: lora.linear(x, m))(x)).count("name=_merged")

    assert products(jnp.ones((2, 9, 64))) == 1  # 18 rows · (64 + 24) > 64 · 24
    assert products(jnp.ones((17, 64))) == 0
    assert products(jnp.ones((2, 9, 64), jnp.bfloat16)) == 0


def test_inputs_are_not_copied_to_float32():
    """Neither to meet an adapter, nor an expert's."""
    inputs, rows = 64, 17
    stacked = {name: jnp.stack([leaf] * 3) for name, leaf in module(inputs).items() if name != "bias"}
    stacked["lora_scale"] = stacked["lora_scale"][0]
    sizes = jnp.array([5, 0, 12], jnp.int32)
    x = jnp.ones((rows, inputs), jnp.bfloat16)
    for function in (lambda x: lora.linear(x, module(inputs)), lambda x: lora.grouped_linear(x, sizes, stacked)):
        assert function(x).dtype == jnp.bfloat16
        assert f"f32[{rows},{inputs}]" not in str(jax.make_jaxpr(function)(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pefts_linear_gives_the_same(dtype):
    m = {name: leaf.astype(dtype) if name in ("kernel", "bias") else leaf for name, leaf in module().items()}
    x = jax.random.normal(jax.random.key(9), (7, 64)).astype(dtype)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(64, 24)

    net = Net().to(getattr(torch, dtype))
    net = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=0.75, target_modules=["proj"]), net)

    def to_torch(a):
        return torch.from_numpy(np.array(a, np.float32)).to(getattr(torch, str(a.dtype)))

    with torch.no_grad():
        net.proj.base_layer.weight.copy_(to_torch(m["kernel"]).T)
        net.proj.base_layer.bias.copy_(to_torch(m["bias"]))
        net.proj.lora_A["default"].weight.copy_(to_torch(m["lora_a"]).T)
        net.proj.lora_B["default"].weight.copy_(to_torch(m["lora_b"]).T)
        expected = net.proj(to_torch(x))
    ours = lora.linear(x, m)
    assert ours.dtype == x.dtype
    expected = expected.float().numpy()
    # in bfloat16 we round before the bias and torch after it
    tolerance = (1e-6 if dtype == "float32" else 2**-7) * np.abs(expected).max()
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("rows", [4, 80])
def test_nothing_dequantised_is_a_residual(remat, rows):
    m = module(inputs=128, outputs=96, packed=True)
    frozen, trainable = lora.split(m)

    def f(trainable, x):
        return jnp.tanh(lora.linear(x, lora.combine(frozen, trainable)))

    f = jax.checkpoint(f) if remat else f
    _, pullback = jax.vjp(f, trainable, jnp.ones((rows, 128)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    assert (64, 96) in shapes, "the codes are what the backward pass dequantises"
    assert (128, 96) not in shapes and (96, 128) not in shapes


def test_dropout_only_with_a_key():
    m = module() | {"lora_dropout": jnp.float32(0.2)}
    x = jnp.ones((4, 64))
    plain = lora.linear(x, {name: leaf for name, leaf in m.items() if name != "lora_dropout"})
    np.testing.assert_allclose(lora.linear(x, m), plain, rtol=1e-6)
    dropped = np.asarray(jax.vmap(lambda key: lora.linear(x, m, key=key))(jax.random.split(jax.random.key(0), 400)))
    assert np.abs(dropped[0] - dropped[1]).max() > 0.1
    deviation = np.std(dropped, axis=0).max() / 20
    np.testing.assert_allclose(np.mean(dropped, axis=0), plain, atol=5 * deviation)
    # Inputs of one: what is kept of them is the same everywhere, and all but a fifth are.
    m |= {"kernel": jnp.zeros((64, 64)), "lora_a": jnp.eye(64), "lora_b": jnp.eye(64), "lora_scale": jnp.float32(1)}
    kept = lora.linear(jnp.ones((50, 64)), {n: leaf for n, leaf in m.items() if n != "bias"}, key=jax.random.key(1))
    assert set(np.unique(kept)) == {0, np.float32(1.25)} and abs(np.mean(kept > 0) - 0.8) < 0.04


def test_the_bias_of_an_adapter_is_scaled_with_it():
    m = module() | {"lora_bias": jnp.arange(24.0)}
    x = jax.random.normal(jax.random.key(1), (5, 64))
    wanted = x @ m["kernel"] + m["bias"][None] + 0.25 * (x @ m["lora_a"] @ m["lora_b"] + m["lora_bias"][None])
    np.testing.assert_allclose(lora.linear(x, m), wanted, rtol=1e-4, atol=1e-4)


def test_scale_zero_switches_the_adapter_off():
    m = module() | {"lora_scale": jnp.float32(0)}
    x = jnp.ones((2, 64))
    np.testing.assert_allclose(lora.linear(x, m), lora.linear(x, lora.strip(m)), rtol=1e-6)
