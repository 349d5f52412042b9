"""What a layer keeps for the backward pass, by the name of the policy; and MLPs in tiles."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import UserError, lora, models, sharding
from jlora.models import decoder
from jlora.models.remat import POLICIES, name_of

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def halves():
    model = models.build(CONFIG)
    settings = lora.LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.2)
    params = lora.init(jax.jit(model.random_params)(jax.random.key(0)), settings, jax.random.key(1))
    frozen, trainable = lora.split(params)
    return model, frozen, jax.tree.map(lambda leaf: leaf + 0.1, trainable)


def gradients(halves, remat, tokens, key=None):
    model, frozen, trainable = halves

    def loss(trainable):
        hidden, _ = model.hidden(lora.combine(frozen, trainable), tokens, remat=remat, key=key)
        return jnp.sum(jnp.sin(hidden * 3))

    return jax.jit(jax.value_and_grad(loss))(trainable)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 24)), jnp.int32)


@pytest.mark.parametrize("remat", ["full", "offload"])
def test_every_policy_gives_the_same_gradients(halves, remat):
    ours, theirs = gradients(halves, remat, TOKENS), gradients(halves, "none", TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, theirs)


ONE, TWO, FOUR = ["full_attention"] * 4, ["conv", "full_attention"] * 2, ["conv", "conv", "full_attention", "conv"]


@pytest.mark.parametrize(("kinds", "barriers"), [(ONE, [False]), (TWO, [True] * 2), (FOUR, [False, True, True])])
def test_layers_that_one_program_holds_are_recomputed_in_turn(kinds, barriers):
    """A layer that is the whole body of a loop needs no barrier; of several, or outside of a loop, each has one."""
    fields = {name: value for name, value in CONFIG.items() if name not in ("hidden_act", "rms_norm_eps")}
    model = models.build(
        fields | {"model_type": "lfm2", "num_hidden_layers": 4, "layer_types": kinds, "block_auto_adjust_ff_dim": False}
    )
    params = jax.eval_shape(model.random_params, jax.random.key(0))
    traced = jax.make_jaxpr(lambda params: model.hidden(params, TOKENS, remat="full")[0])(params)
    assert [equation.params["prevent_cse"] for equation in layers_of(traced.jaxpr)] == barriers


def layers_of(jaxpr):
    """The outermost recomputed equations, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("checkpoint", "remat", "remat2"):
            yield equation
        else:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from layers_of(inner)


@pytest.mark.parametrize("tile", [1 << 10, 1 << 11])
def test_tiles_of_an_mlp_give_the_gradients_of_the_whole(halves, tile, monkeypatch):
    whole = gradients(halves, "full", TOKENS)
    monkeypatch.setattr(decoder, "TILE", tile)
    jax.clear_caches()
    assert decoder._tiles((2, 24, 32), 80) > 1
    tiled = gradients(halves, "full", TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), tiled, whole)


def test_tiles_on_a_mesh_hold_some_of_every_devices_tokens(halves, monkeypatch):
    model, frozen, trainable = halves
    whole = gradients(halves, "full", TOKENS)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, sequence=2), jax.devices()[:4])
    monkeypatch.setattr(decoder, "TILE", 1 << 9)
    with sharding.on(mesh):
        assert decoder._tiles((2, 24, 32), 80) == 2
        assert decoder._tiles((2, 25, 32), 80) == 1
        x = jnp.arange(2 * 24 * 3).reshape(2, 24, 3)
        cut = jax.jit(lambda x: decoder._cut(x, 2))(jax.device_put(x, sharding.batch_sharding(mesh)))
        np.testing.assert_array_equal(cut[1, :, :6], x[:, 6:12])
        np.testing.assert_array_equal(jax.jit(decoder._joined)(cut).reshape(x.shape), x)
    spread = model, sharding.shard(frozen, mesh), sharding.shard(trainable, mesh)
    tokens = jax.device_put(TOKENS, sharding.batch_sharding(mesh))
    with sharding.on(mesh):
        tiled = gradients(spread, "full", tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), tiled, whole)


MIXTURE = CONFIG | dict(num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MIXTURE | dict(model_type="mixtral"), id="alone"),
        pytest.param(
            MIXTURE
            | dict(model_type="granitemoehybrid", layer_types=["attention"], mamba_n_heads=4)
            | dict(shared_intermediate_size=80, intermediate_size=40),
            id="beside an MLP",
        ),
        pytest.param(
            MIXTURE
            | dict(model_type="nemotron_h", layers_block_type=["moe"], moe_intermediate_size=80, moe_latent_size=20)
            | dict(moe_shared_expert_intermediate_size=24, tie_word_embeddings=False),
            id="in a narrower space",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tiles_of_experts_give_the_gradients_of_the_whole(config, monkeypatch):
    """A tile holds the tokens of half of the experts' room: two of four are passed."""
    model = models.build(config)
    settings = lora.LoraConfig(r=3, target_modules="all-linear", target_parameters=["experts.down_proj"])
    params = lora.init(jax.jit(model.random_params)(jax.random.key(0)), settings, jax.random.key(1))
    frozen, trainable = lora.split(params)
    halves = model, frozen, jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    whole = gradients(halves, "full", TOKENS)
    monkeypatch.setattr(decoder, "TILE", 1 << 10)
    jax.clear_caches()
    scans = str(jax.make_jaxpr(lambda x: model.hidden(lora.combine(frozen, x), TOKENS, remat="full")[0])(trainable))
    assert "length=4" in scans  # 2 · 24 · 80 values: 3,840
    tiled = gradients(halves, "full", TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), tiled, whole)


def test_tiles_drop_other_inputs_each(halves, monkeypatch):
    monkeypatch.setattr(decoder, "TILE", 1 << 10)
    jax.clear_caches()
    same = jnp.full((1, 24), 5)  # without dropout every token after the first would be like its neighbour in the MLP
    first, again = (gradients(halves, "full", same, jax.random.key(3)) for _ in range(2))
    other = gradients(halves, "full", same, jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first[0] != other[0]


@pytest.mark.parametrize(("shape", "tiles"), [((1, 24, 32), 1), ((2, 24, 32), 3), ((2, 23, 32), 1)])
def test_tiles_divide_the_tokens(shape, tiles, monkeypatch):
    monkeypatch.setattr(decoder, "TILE", 1 << 11)
    assert decoder._tiles(shape, 100) == tiles or tiles == 1


def test_what_is_kept_of_a_layer(halves):
    """Of "full" the layers' inputs, of "none" many times as much."""
    model, frozen, trainable = halves

    def kept(remat):
        def hidden(trainable):
            return model.hidden(lora.combine(frozen, trainable), TOKENS, remat=remat)[0]

        _, pullback = jax.vjp(hidden, trainable)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.ndim == 4 and leaf.shape[0] == 3)

    inputs = 3 * 2 * 24 * 32
    assert kept("full") == inputs
    assert kept("none") > 4 * inputs


def test_policies_are_named():
    assert [name_of(remat) for remat in (True, False, *POLICIES)] == ["full", "none", *POLICIES]
    with pytest.raises(UserError, match="found remat 'all'; expected True, False, 'full', 'offload', 'none'"):
        name_of("all")
