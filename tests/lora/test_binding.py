"""Models that know nothing of jlora: Linen and NNX, adapted, packed, trained, merged and saved."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from jlora import lora, quant, tree
from jlora.optim import OptimConfig, make_optimizer

KEY = jax.random.key(0)


class Linen(nn.Module):
    """Every kind of kernel: Embed, Conv, DenseGeneral with several outputs and several inputs, Dense."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(31, 24, name="embed")(tokens)
        x = nn.Conv(24, (3,), name="conv")(x)
        q = nn.DenseGeneral((3, 8), name="query")(x)
        x = x + nn.DenseGeneral(24, axis=(-2, -1), name="out")(nn.tanh(q))
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(31, name="head")(x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(24, 40, rngs=rngs), nnx.Linear(40, 24, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Nnx(nnx.Module):
    """Modules in a list, an embedding, a convolution, and state that is no parameter."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(31, 24, rngs=rngs)
        self.conv = nnx.Conv(24, 24, kernel_size=(3,), rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(24, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(24, 31, rngs=rngs)

    def __call__(self, tokens):
        x = self.conv(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def linen():
    model = Linen()
    params = model.init(KEY, jnp.zeros((1, 5), jnp.int32))["params"]
    return lambda params, tokens: model.apply({"params": params}, tokens), params


MODELS = {"linen": linen, "nnx": lambda: lora.from_nnx(Nnx(nnx.Rngs(0)))}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (4, 5)))


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def everything(params):
    """All that can be adapted: each kernel and the embedding."""
    modules = {path.rpartition("/")[0] for path in tree.flatten(params) if path.endswith(("/kernel", "/embedding"))}
    return sorted(module.replace("/", ".") for module in modules)


def test_nnx_as_a_function_of_its_parameters():
    model = Nnx(nnx.Rngs(0))
    apply, params = lora.from_nnx(model)
    np.testing.assert_array_equal(apply(params, TOKENS), model(TOKENS))
    assert params["blocks"]["1"]["up"]["kernel"].shape == (24, 40)
    changed = tree.map_with_path(lambda path, leaf: leaf + 1 if path == "head/bias" else leaf, params)
    np.testing.assert_allclose(apply(changed, TOKENS), model(TOKENS) + 1, rtol=1e-5)


def test_shapes_of_the_factors():
    _, params = linen()
    config = lora.LoraConfig(r=4, target_modules=everything(params))
    adapted = lora.init(params, config, KEY)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(adapted).items() if path.endswith(("_a", "_b"))}
    assert shapes["conv/lora_a"] == (3, 24, 4) and shapes["conv/lora_b"] == (4, 24)
    assert shapes["query/lora_a"] == (24, 4) and shapes["query/lora_b"] == (4, 3, 8)
    assert shapes["out/lora_a"] == (3, 8, 4) and shapes["out/lora_b"] == (4, 24)
    assert shapes["embed/lora_a"] == (31, 4) and shapes["embed/lora_b"] == (4, 24)
    without = tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if path != "query/bias"})
    ruled = lora.init(without, config, KEY, input_axes=[("query", 1)])
    assert ruled["query"]["lora_b"].shape == (4, 3, 8)
    assert lora.init(without, config, KEY)["query"]["lora_b"].shape == (4, 8)
    with pytest.raises(ValueError, match="query has 3 axes; 3 of them cannot be inputs"):
        lora.init(without, config, KEY, input_axes=[("query", 3)])


@pytest.mark.parametrize("packed", [False, True])
def test_train_merge_and_save(model, packed, tmp_path):
    apply, base = model
    if packed:
        rules = jlora.QuantConfig(rules=((r"(.*/)?kernel", "nf4"),))
        base = tree.map_with_path(lambda p, x: quant.quantize(x) if quant.leaf_format(p, rules) else x, base)
    dense = tree.map_with_path(lambda _, x: quant.dequantize(x) if quant.is_packed(x) else x, base)
    bound = lora.bind(apply)
    params = lora.init(base, lora.LoraConfig(r=4, lora_alpha=8, target_modules=everything(base)), KEY)
    np.testing.assert_allclose(bound(params, TOKENS), apply(dense, TOKENS), atol=1e-5)

    frozen, trainable = lora.split(params)
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2, schedule="constant"), 100)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            logits = bound(lora.combine(frozen, trainable), TOKENS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, (TOKENS * 7) % 31).mean()

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = optimizer.init(trainable), []
    for _ in range(40):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    params = lora.combine(frozen, trainable)
    for path, leaf in tree.flatten(lora.strip(params)).items():
        assert leaf is tree.flatten(base)[path]

    trained = bound(params, TOKENS)
    merged = lora.merge(params)
    assert not any(lora.is_adapter(path) for path in tree.flatten(merged))
    whole = tree.map_with_path(lambda _, x: quant.dequantize(x) if quant.is_packed(x) else x, merged)
    np.testing.assert_allclose(apply(whole, TOKENS), trained, atol=1e-4)

    jlora.save_adapter(tmp_path / "adapter", params)
    loaded = jlora.load_adapter(base, tmp_path / "adapter")
    np.testing.assert_allclose(bound(loaded, TOKENS), trained, atol=1e-5)


def test_no_sum_is_kept_for_the_backward_pass(model):
    """The residuals of a bound model hold no dense kernel of what is adapted or packed."""
    apply, base = model
    rules = jlora.QuantConfig(rules=((r".*(up|head|query|out)/kernel", "nf4"),))
    packed = tree.map_with_path(lambda p, x: quant.quantize(x) if quant.leaf_format(p, rules) else x, base)
    params = lora.init(packed, lora.LoraConfig(r=4, target_modules="all-linear"), KEY)
    frozen, trainable = lora.split(params)
    bound = lora.bind(apply)
    _, pullback = jax.vjp(lambda trainable: bound(lora.combine(frozen, trainable), TOKENS), trainable)
    kept = {leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.dtype == jnp.float32}
    formed = {tuple(leaf.shape) for leaf in tree.flatten(params).values() if quant.is_packed(leaf)}
    assert formed and not formed & kept
