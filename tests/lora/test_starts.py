"""Starts from the base weights: PEFT's A and B, and a model that computes the same on an untouched base."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from jlora import hub, lora, models, quant, tree

CONFIG = transformers.LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    tie_word_embeddings=False,
)
TOKENS = np.arange(12, dtype=np.int32)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return folder, *hub.load(folder)


def pefts_delta(folder, **settings):
    """Hub module name → scale · B @ A [out, in] of PEFT's start."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=10, **settings))
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_500"])
def test_the_update_is_pefts_and_the_model_starts_as_it_was(start, base, tmp_path):
    folder, model, params = base
    targets = ["q_proj", "up_proj", "down_proj"]
    config = lora.LoraConfig(r=4, lora_alpha=10, target_modules=targets, init_lora_weights=start)
    adapted = lora.init(params, config, jax.random.key(0))
    np.testing.assert_allclose(model(adapted, TOKENS), model(params, TOKENS), atol=1e-5)
    assert tree.flatten(adapted)["layers/mlp/up_proj/kernel"] is tree.flatten(params)["layers/mlp/up_proj/kernel"]
    expected = pefts_delta(folder, target_modules=targets, init_lora_weights=start)
    loose = 1e-3 if "niter" in start else 1e-5  # both iterate until nothing changes
    for path, module in (("self_attn/q_proj", "self_attn.q_proj"), ("mlp/down_proj", "mlp.down_proj")):
        leaves = tree.subtree(adapted, f"layers/{path}")
        for layer in range(2):
            delta = 2.5 * leaves["lora_a"][layer] @ leaves["lora_b"][layer]
            wanted = expected[f"model.layers.{layer}.{module}"].T
            assert np.abs(delta - wanted).max() <= loose * np.abs(wanted).max()


def noise(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "more", [{}, dict(use_dora=True), dict(rank_pattern={r"layers\.1\.mlp\.up_proj": 2}), dict(layers_to_transform=[1])]
)
def test_pissa_is_written_as_plain_lora_for_the_untouched_base(more, base, tmp_path):
    folder, model, params = base
    settings = dict(target_modules=["q_proj", "v_proj", "up_proj"]) | more
    config = lora.LoraConfig(r=4, lora_alpha=10, init_lora_weights="pissa", **settings)
    adapted = lora.init(params, config, jax.random.key(0))
    trained = tree.map_with_path(
        lambda path, leaf: (
            jnp.asarray(np.asarray(leaf) * (1 + noise(leaf.shape, len(path))))  # what is zero stays zero
            if path.endswith(("lora_a", "lora_b"))
            else leaf
        ),
        adapted,
    )
    hub.save_adapter(tmp_path / "adapter", trained, base=str(folder))
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert opened.peft_config["default"].r == 8
    with torch.no_grad():
        theirs = opened(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    ours = model(trained, TOKENS)
    assert np.abs(ours - model(params, TOKENS)).max() > 0.001
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())
    np.testing.assert_allclose(model(lora.merge(trained), TOKENS), ours, atol=1e-4 * np.abs(ours).max())


def test_orthogonal_factors_are_random_and_their_product_is_nothing(base):
    _, model, params = base
    adapted = lora.init(params, lora.LoraConfig(r=6, init_lora_weights="orthogonal"), jax.random.key(0))
    leaves = adapted["layers"]["mlp"]["up_proj"]
    assert leaves["lora_a"].shape == (2, 24, 6) and leaves["lora_b"].shape == (2, 6, 40)
    assert 0.03 < np.std(leaves["lora_a"]) < 0.3 and 0.03 < np.std(leaves["lora_b"]) < 0.3
    np.testing.assert_allclose(leaves["lora_a"] @ leaves["lora_b"], 0, atol=1e-6)
    np.testing.assert_allclose(model(adapted, TOKENS), model(params, TOKENS), atol=1e-5)


def test_loftq_starts_with_what_packing_lost():
    """PEFT's formula (which needs a GPU there): the leading part of base - packed, as A = √S Vᵀ and B = U √S."""
    model = models.build(CONFIG.to_dict())
    dense = jax.jit(model.random_params)(jax.random.key(0))
    packed = tree.map_with_path(lambda p, x: quant.quantize(x) if p.endswith("up_proj/kernel") else x, dense)
    config = lora.LoraConfig(r=8, lora_alpha=8, target_modules=["up_proj"], init_lora_weights="loftq")
    adapted = lora.init(packed, config, jax.random.key(0), dense=dense)
    kernel, leaves = dense["layers"]["mlp"]["up_proj"]["kernel"], adapted["layers"]["mlp"]["up_proj"]
    for layer in range(2):
        lost = np.asarray(kernel[layer] - quant.dequantize(leaves["kernel"])[layer])
        left, values, right = np.linalg.svd(lost)
        best = (left[:, :8] * values[:8]) @ right[:8]
        np.testing.assert_allclose(leaves["lora_a"][layer] @ leaves["lora_b"][layer], best, atol=1e-6)
    with pytest.raises(ValueError, match="needs packed params, and the same params unpacked"):
        lora.init(packed, config, jax.random.key(0))


@pytest.mark.parametrize(
    ("settings", "leaf"),
    [
        (dict(use_dora=True), "layers/mlp/up_proj/lora_magnitude"),
        (dict(lora_bias=True), "layers/mlp/up_proj/lora_bias"),
        (dict(modules_to_save=["norm", "lm_head"]), "lm_head/trained_kernel"),
        (dict(trainable_token_indices=[3, 9]), "embed_tokens/lora_tokens"),
        (dict(trainable_token_indices={"lm_head": [3, 9]}), "lm_head/lora_tokens"),
        (dict(target_modules=["embed_tokens", "lm_head"]), "embed_tokens/lora_b"),
        (dict(target_modules=["q_proj"], layers_to_transform=1), "layers/self_attn/q_proj/lora_rank"),
    ],
)
def test_every_feature_starts_as_the_base_and_is_where_it_should_be(settings, leaf, base, tmp_path):
    folder, model, params = base
    adapted = lora.init(params, lora.LoraConfig(r=4, **settings), jax.random.key(0))
    np.testing.assert_allclose(model(adapted, TOKENS), model(params, TOKENS), atol=1e-5)
    assert leaf in tree.flatten(adapted)
    assert tree.flatten(lora.strip(adapted)).keys() == tree.flatten(params).keys()
    hub.save_adapter(tmp_path / "adapter", adapted, base=str(folder))
    again = hub.load_adapter(params, tmp_path / "adapter")
    for path, value in tree.flatten(adapted).items():
        np.testing.assert_allclose(tree.flatten(again)[path], value, atol=1e-6, err_msg=path)


def test_a_tied_embedding_has_one_adapter_in_both_places():
    model = models.build(CONFIG.to_dict() | {"tie_word_embeddings": True})
    params = jax.jit(model.random_params)(jax.random.key(0))
    config = lora.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    adapted = lora.init(params, config, jax.random.key(0))
    assert "lora_tied" in adapted["embed_tokens"]
    merged = lora.merge(adapted)
    assert "lm_head" not in merged
    np.testing.assert_allclose(model(adapted, TOKENS), model(merged, TOKENS), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target_modules=["embed_tokens"], use_dora=True), "use_dora is for linears; embed_tokens"),
        (dict(target_modules=["embed_tokens"], init_lora_weights="pissa"), "'pissa' is for linears; embed_tokens"),
        (dict(r=25, init_lora_weights="pissa"), "rank 25 is more than a kernel"),
        (dict(bias="all"), "these modules have no biases"),
        (dict(modules_to_save=["classifier"]), "no module's name ends in classifier"),
        (dict(modules_to_save=["layers.1.mlp.up_proj"]), "must select all layers of a stack or none"),
        (dict(trainable_token_indices=[61]), r"\[61\] are outside the vocabulary of 61"),
        (dict(trainable_token_indices={"proj": [1]}), "'proj' names 0 modules"),
        (dict(target_modules=["q_proj"], layers_to_transform=[7]), "layers_to_transform 7"),
        (dict(target_parameters=["experts.down_proj"]), "target_parameters"),
    ],
)
def test_what_cannot_be_is_said(settings, message, base):
    with pytest.raises(ValueError, match=message):
        lora.init(base[2], lora.LoraConfig(**settings), jax.random.key(0))


def mean_loss(model):
    def loss(params):
        logits = model(params, TOKENS)[:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1)
        return -picked.mean()

    return loss


LORA_GA = dict(r=3, lora_alpha=6, target_modules=["v_proj", "down_proj"], init_lora_weights="lora_ga")


@pytest.fixture(scope="module")
def gradients(base):
    """Those of the kernels, which are the same for every direction and scale."""
    _, model, params = base
    return lora.kernel_gradients(mean_loss(model), params, lora.LoraConfig(**LORA_GA))


# Every direction and every scale by default; directions and scales do not know of each other.
DIRECTIONS, SCALES = ("ArB2r", "ArBr", "A2rBr"), ("stable", "gd_scale", "weight_svd")
SETTINGS = [
    pytest.param(direction, scale, marks=[pytest.mark.slow] * (direction != "ArB2r" and scale != "stable"))
    for scale in SCALES
    for direction in DIRECTIONS
]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(("direction", "scale"), SETTINGS)
def test_lora_ga_is_pefts(direction, scale, base, gradients):
    """The same A and B, but for signs, that PEFT makes of the same gradients."""
    folder, model, params = base
    config = lora.LoraConfig(**LORA_GA, lora_ga_direction=direction, lora_ga_scale=scale)
    adapted = lora.init(params, config, jax.random.key(0), gradients=gradients)
    np.testing.assert_allclose(model(adapted, TOKENS), model(params, TOKENS), atol=1e-5)

    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(TOKENS, dtype=torch.long)
    theirs = peft.LoraConfig(**LORA_GA, lora_ga_config=peft.LoraGAConfig(direction=direction, scale=scale))
    peft.tuners.lora.preprocess_loraga(reference, theirs, lambda: reference(ids, labels=ids).loss.backward())
    opened = peft.get_peft_model(reference, theirs)
    for layer in range(2):
        for path, name in (("self_attn/v_proj", "self_attn.v_proj"), ("mlp/down_proj", "mlp.down_proj")):
            module = opened.get_submodule(f"base_model.model.model.layers.{layer}.{name}")
            leaves = tree.subtree(adapted, f"layers/{path}")
            expected_a = module.lora_A["default"].weight.detach().numpy().T
            expected_b = module.lora_B["default"].weight.detach().numpy().T
            for ours, wanted, axis in ((leaves["lora_a"], expected_a, 0), (leaves["lora_b"], expected_b, 1)):
                signs = np.sign(np.sum(np.asarray(ours[layer]) * wanted, axis=axis, keepdims=True))
                # PEFT takes the weight's norm from a randomised SVD, which underestimates it.
                loose = 0.1 if scale == "weight_svd" else 2e-3
                np.testing.assert_allclose(ours[layer] * signs, wanted, atol=loose * np.abs(wanted).max())


def test_lora_ga_on_a_packed_base(base):
    _, model, params = base
    packed = tree.map_with_path(lambda p, x: quant.quantize(x) if p.endswith("down_proj/kernel") else x, params)
    config = lora.LoraConfig(r=3, target_modules=["down_proj"], init_lora_weights="lora_ga")
    gradients = lora.kernel_gradients(mean_loss(model), packed, config)
    adapted = lora.init(packed, config, jax.random.key(0), gradients=gradients)
    np.testing.assert_allclose(model(adapted, TOKENS), model(packed, TOKENS), atol=1e-5)
    with pytest.raises(ValueError, match=r"what jlora\.lora\.kernel_gradients returns"):
        lora.init(packed, config, jax.random.key(0))


def test_eva_is_pefts(base, tmp_path):
    """The same ranks, scales and directions, but for signs, that PEFT finds in the same inputs."""
    folder, model, params = base
    tokens = np.random.default_rng(3).integers(0, 61, (4, 40)).astype(np.int32)
    targets = ["q_proj", "o_proj", "down_proj"]
    config = lora.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights="eva")
    halves = [model.input_moments(params, half) for half in (tokens[:2], tokens[2:])]
    moments = jax.tree.map(jnp.add, *halves)
    assert {path.rpartition("/")[0] for path in tree.flatten(moments)} >= {"layers/mlp/gate_proj"}
    adapted = lora.init(params, config, jax.random.key(0), moments=moments)
    np.testing.assert_array_equal(model(adapted, TOKENS), model(params, TOKENS))

    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights="eva", eva_config=peft.tuners.lora.EvaConfig()
    )
    ids = torch.tensor(tokens, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = peft.get_peft_model(reference, theirs)
        peft.initialize_lora_eva_weights(opened, dataloader=[batch], show_progress_bar=False)
    expected = {
        name.removeprefix("base_model.model."): module
        for name, module in opened.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    for path in ("self_attn/q_proj", "self_attn/o_proj", "mlp/down_proj"):
        leaves = tree.subtree(adapted, f"layers/{path}")
        for layer in range(2):
            module = expected.get(f"model.layers.{layer}.{path.replace('/', '.')}")
            rank = int(leaves["lora_rank"][layer]) if "lora_rank" in leaves else leaves["lora_a"].shape[-1]
            assert rank == (module.r["default"] if module else 0)
            if not module:
                continue
            assert float(leaves["lora_scale"][layer]) == pytest.approx(module.scaling["default"])
            wanted = module.lora_A["default"].weight.detach().numpy()
            ours = np.asarray(leaves["lora_a"][layer, :, :rank]).T
            agreement = np.abs(np.sum(ours * wanted, axis=1))
            assert np.all(agreement > 0.98), agreement
    with pytest.raises(ValueError, match=r"what Model\.input_moments returns"):
        lora.init(params, config, jax.random.key(0))


def test_padding_is_no_input(base):
    _, model, params = base
    tokens = np.random.default_rng(3).integers(0, 61, (2, 9)).astype(np.int32)
    segments = np.array([[1] * 9, [0] * 4 + [1] * 5], np.int32)
    moments = model.input_moments(params, tokens, None, segments)
    alone = [model.input_moments(params, tokens[:1]), model.input_moments(params, tokens[1:, 4:])]
    for path, leaf in tree.flatten(jax.tree.map(jnp.add, *alone)).items():
        np.testing.assert_allclose(tree.flatten(moments)[path], leaf, rtol=1e-3, atol=1e-3)
