"""New adapters: where they go, how they start, and that PEFT would put them in the same places."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from jlora import lora, models
from jlora.lora.matching import matches
from jlora.lora.sites import with_prefixes
from jlora.lora.targets import find_targets

CONFIG = LlamaConfig(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    tie_word_embeddings=False,
)
MODEL = models.build(CONFIG.to_dict())
PARAMS = jax.jit(MODEL.random_params)(jax.random.key(0))
KEY = jax.random.key(7)
SETTINGS = {
    "all": dict(target_modules="all-linear"),
    "suffix": dict(target_modules=["q_proj", "mlp.down_proj"]),
    "regex": dict(target_modules=r".*layers\.[02]\.self_attn\.(q|o)_proj"),
    "hub_prefix": dict(target_modules=r"model\.layers\.1\..*_proj"),
    "one_layer": dict(target_modules=["layers.1.self_attn.v_proj"]),
    "head": dict(target_modules=["lm_head", "k_proj"]),
    "exclude": dict(target_modules="all-linear", exclude_modules=["gate_proj", "layers.0.self_attn.q_proj"]),
    "ranks": dict(
        target_modules="all-linear",
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={"down_proj": 32},
    ),
    "rslora": dict(target_modules=["q_proj"], use_rslora=True),
}


def peft_adapters(settings):
    """Dotted name → (rank, scale) of every module that PEFT adapts."""
    model = peft.get_peft_model(LlamaForCausalLM(CONFIG), peft.LoraConfig(r=4, lora_alpha=8, **settings))
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).removeprefix("model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("case", SETTINGS)
def test_targets_ranks_and_scales_are_pefts(case):
    config = lora.LoraConfig(r=4, lora_alpha=8, **SETTINGS[case])
    ours = {}
    for target in find_targets(PARAMS, config):
        ours |= {name: (r, s) for name, r, s in zip(target.site.names, target.ranks, target.scales, strict=True) if r}
    expected = peft_adapters(SETTINGS[case])
    assert ours.keys() == expected.keys()
    for name, (rank, scale) in expected.items():
        assert ours[name] == (rank, pytest.approx(scale)), name


def test_a_new_adapter_changes_nothing_and_leaves_the_base_alone():
    params = lora.init(PARAMS, lora.LoraConfig(r=4, lora_alpha=8), KEY)
    tokens = jnp.arange(10)[None]
    np.testing.assert_array_equal(MODEL(params, tokens), MODEL(PARAMS, tokens))
    assert lora.strip(params).keys() == PARAMS.keys()
    assert params["layers"]["mlp"]["up_proj"]["kernel"] is PARAMS["layers"]["mlp"]["up_proj"]["kernel"]
    adapter = params["layers"]["mlp"]["up_proj"]
    assert adapter["lora_a"].shape == (3, 24, 4) and adapter["lora_b"].shape == (3, 4, 40)
    assert adapter["lora_a"].dtype == adapter["lora_b"].dtype == jnp.float32
    np.testing.assert_array_equal(adapter["lora_scale"], [2, 2, 2])


def test_another_target_does_not_change_a_start():
    one = lora.init(PARAMS, lora.LoraConfig(target_modules=["q_proj"]), KEY)
    both = lora.init(PARAMS, lora.LoraConfig(target_modules=["q_proj", "up_proj"]), KEY)
    first, second = (p["layers"]["self_attn"]["q_proj"]["lora_a"] for p in (one, both))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first[0] - first[1]).max() > 0.01


def test_every_module_has_a_start_of_its_own():
    start = lora.init(PARAMS, lora.LoraConfig(target_modules=["q_proj", "o_proj"]), KEY)["layers"]["self_attn"]
    assert start["q_proj"]["lora_a"].shape == start["o_proj"]["lora_a"].shape
    assert (start["q_proj"]["lora_a"] != start["o_proj"]["lora_a"]).all()


@pytest.mark.parametrize(
    "items, wanted",
    [
        (("q_proj",), True),
        (("self_attn.q_proj",), True),
        (("layers.0.self_attn.q_proj",), True),
        (("model.layers.0.self_attn.q_proj",), True),
        (("self_attn",), False),
        (("proj",), False),
        (("attn.q_proj",), False),
        (("0.self_attn",), False),
        (r".*\.0\..*q_proj", True),
        (r"q_proj", False),
    ],
    ids=str,
)
def test_patterns_mean_whole_parts_at_the_end(items, wanted):
    assert matches(with_prefixes("layers.0.self_attn.q_proj"), items) is wanted


def test_default_start_has_pefts_distribution():
    kernel = {"q_proj": {"kernel": jnp.zeros((400, 8))}}
    ours = np.asarray(lora.init(kernel, lora.LoraConfig(r=64), KEY)["q_proj"]["lora_a"])
    layer = (
        peft.get_peft_model(
            LlamaForCausalLM(LlamaConfig(**{**CONFIG.to_dict(), "hidden_size": 402, "num_hidden_layers": 1})),
            peft.LoraConfig(r=64, target_modules=["q_proj"]),
        )
        .base_model.model.model.layers[0]
        .self_attn.q_proj
    )
    theirs = layer.lora_A["default"].weight.detach().numpy()
    assert ours.std() == pytest.approx(theirs.std(), rel=0.02)
    assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=0.01)


@pytest.mark.parametrize(("kind", "zero"), [("gaussian", "lora_b"), ("zero_a", "lora_a"), (False, None)])
def test_other_starts(kind, zero):
    adapter = lora.init(PARAMS, lora.LoraConfig(r=4, init_lora_weights=kind), KEY)["layers"]["self_attn"]["q_proj"]
    for name in ("lora_a", "lora_b"):
        assert bool(np.any(adapter[name])) == (name != zero)
    if kind == "gaussian":
        assert np.asarray(adapter["lora_a"]).std() == pytest.approx(1 / 4, rel=0.2)


def test_ranks_that_differ_in_a_stack_are_zero_padded():
    config = lora.LoraConfig(
        r=4, target_modules=r".*layers\.[02]\.mlp\.up_proj", rank_pattern={"layers.2.mlp.up_proj": 6}
    )
    adapter = lora.init(PARAMS, config, KEY)["layers"]["mlp"]["up_proj"]
    np.testing.assert_array_equal(adapter["lora_rank"], [4, 0, 6])
    assert adapter["lora_a"].shape == (3, 24, 6)
    assert not np.any(adapter["lora_a"][1]) and not np.any(adapter["lora_a"][0, :, 4:])
    assert np.all(adapter["lora_a"][2])


def test_what_matches_nothing_is_listed():
    config = lora.LoraConfig(target_modules=["q_proj", "qq_proj"], rank_pattern={"nope": 3})
    with pytest.raises(ValueError) as error:
        lora.init(PARAMS, config, KEY)
    assert "target_modules ('qq_proj',)" in str(error.value) and "rank_pattern 'nope'" in str(error.value)
    assert "'q_proj'" not in str(error.value) and "down_proj, embed_tokens, gate_proj" in str(error.value)
    with pytest.raises(ValueError, match="already hold adapters"):
        lora.init(lora.init(PARAMS, lora.LoraConfig(), KEY), lora.LoraConfig(), KEY)


def test_config_faults_are_all_listed():
    with pytest.raises(ValueError) as error:
        lora.LoraConfig(r=0, lora_dropout=1.0, init_lora_weights="corda", target_modules="(", bias="some")
    for part in ("r=0", "lora_dropout=1.0", "'corda'", "bias='some'", "'(' is not a regular expression"):
        assert part in str(error.value)
