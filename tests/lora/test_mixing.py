"""Mixed adapters: what they do is what PEFT's, or the sum of the changes, says; whatever kind of adapters they are."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import jlora
from jlora import lora, tree
from jlora.lora.mixing import METHODS
from jlora.lora.task_arithmetic import RULES, add_changes
from jlora.models import build

SIZES = dict(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
)
WEIGHTS = (0.7, -0.4, 1.5)
NAMES = ("red", "green", "blue")


def randomised(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """(PEFT's model with the adapters red, green and blue; our params without; the adapters as trees)."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    folder = tmp_path_factory.mktemp("model")
    base.save_pretrained(folder)
    model = None
    for alpha, name in ((4, "red"), (8, "green"), (2, "blue")):
        modules = ["q_proj", "down_proj"] + (["k_proj"] if name == "green" else [])
        config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=modules)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    randomised(model, 1)
    model.save_pretrained(folder / "adapters")
    _, params = jlora.load(folder)
    return model, params, {name: jlora.load_adapter(params, folder / "adapters" / name) for name in NAMES}


def changes(params):
    """What an adapter changes: path of a weight → float32 difference."""
    base, merged = tree.flatten(lora.strip(params)), tree.flatten(lora.merge(params))
    found = {
        path: np.asarray(leaf, np.float32) - np.asarray(base.get(path, 0), np.float32) for path, leaf in merged.items()
    }
    return {path: change for path, change in found.items() if np.abs(change).max() > 0}


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("peft:")])
def test_pefts_methods_are_pefts(three, method):
    model, params, adapters = three
    density = (
        {"density": 1.0 if "dare" in method else 0.6}
        if any(word in method for word in ("dare", "ties", "magn"))
        else {}
    )
    kind = method.removeprefix("peft:")
    model.add_weighted_adapter(list(NAMES), list(WEIGHTS), kind, combination_type=kind, **density)
    mixed, fits = lora.mix(params, adapters, WEIGHTS, method=method, **density)
    found = changes(mixed)
    assert sorted(found) == [
        f"layers/{name}/kernel" for name in ("mlp/down_proj", "self_attn/k_proj", "self_attn/q_proj")
    ]
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or kind not in module.lora_A:
            continue
        path, layer = name.removeprefix("base_model.model.model.layers.").partition(".")[2], int(name.split(".")[4])
        expected = module.get_delta_weight(kind).detach().numpy().T
        ours = found[f"layers/{path.replace('.', '/')}/kernel"][layer]
        np.testing.assert_allclose(ours, expected, atol=2e-6 + 2e-5 * np.abs(expected).max(), err_msg=name)
    assert fits.modules and "of the energy kept" in str(fits)


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_sums_are_exact(three, method):
    _, params, adapters = three
    mixed, fits = lora.mix(params, adapters, WEIGHTS, method=method)
    found, apart = changes(mixed), [changes(adapter) for adapter in adapters.values()]
    for path in found:
        expected = sum(weight * of.get(path, 0) for weight, of in zip(WEIGHTS, apart, strict=True))
        np.testing.assert_allclose(found[path], expected, atol=2e-6)
    assert fits.energy_kept == pytest.approx(1, abs=1e-6)
    ranks = {fit.name: fit.rank for fit in fits.modules}
    assert ranks["layers/self_attn/q_proj[1]"] == 12 and ranks["layers/self_attn/k_proj[1]"] == 4


def test_pefts_linear_says_how_much_it_misses(three):
    _, params, adapters = three
    _, fits = lora.mix(params, adapters, WEIGHTS, method="peft:linear")
    assert fits.energy_kept < 0.6  # cross terms: peft's "linear" is no sum of the changes
    _, fits = lora.mix(params, adapters, WEIGHTS, method="svd", rank=12)
    assert fits.energy_kept > 1 - 1e-6


MODEL = build(transformers.Qwen2Config(**SIZES).to_dict())
KINDS = {
    "plain": dict(r=3, rank_pattern={"q_proj": 5}, layers_to_transform=[0, 2]),
    "rslora": dict(r=4, use_rslora=True, lora_alpha=6),
    "dora": dict(r=2, use_dora=True),
    "pissa": dict(r=3, init_lora_weights="pissa"),
    "biases": dict(r=3, bias="lora_only", lora_bias=True),
    "copies": dict(r=2, target_modules=["v_proj"], modules_to_save=["norm", "lm_head"]),
}


@functools.cache
def base():
    return jax.jit(MODEL.random_params)(jax.random.key(0))


@functools.cache
def adapted(kind):
    targets = ["q_proj", "embed_tokens"] if kind == "plain" else ["q_proj", "up_proj"]
    return adapted_as("", **dict(target_modules=targets) | KINDS[kind])


def adapted_as(name, **settings):
    frozen, trainable = lora.split(lora.init(base(), jlora.LoraConfig(**settings), jax.random.key(1)))

    return lora.combine(frozen, tree.map_with_path(lambda path, leaf: moved(leaf, len(name + path)), trainable))


def moved(leaf, seed):
    moves = np.random.default_rng(seed).normal(0, 0.05, leaf.shape)
    return jnp.asarray(np.asarray(leaf) + moves.astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_with_weight_one_is_itself(kind):
    for method, settings in (("cat", {}), ("linear", {}), ("ties", {"density": 1.0}), ("dare_ties", {"density": 1.0})):
        if kind == "dora" and method == "cat":
            with pytest.raises(ValueError, match="found DoRA, which is not a plain product; use 'linear'"):
                lora.mix(base(), [adapted(kind)], method=method)
            continue
        rank = {"rank": 1.0} if method not in ("cat", "linear") else {}
        mixed, _ = lora.mix(base(), [adapted(kind)], method=method, **rank, **settings)
        found, expected = changes(mixed), changes(adapted(kind))
        assert found.keys() == expected.keys()
        for path in expected:
            np.testing.assert_allclose(found[path], expected[path], atol=3e-6, err_msg=f"{method} {path}")


def test_adapters_of_every_kind_add_up():
    kinds = list(KINDS)
    weights = np.linspace(-1, 1, len(kinds)).tolist()
    mixed, fits = lora.mix(base(), {kind: adapted(kind) for kind in kinds}, weights, method="linear", rank=1.0)
    found, apart = changes(mixed), [changes(adapted(kind)) for kind in kinds]
    assert found.keys() == set().union(*apart)
    for path in found:
        expected = sum(weight * of.get(path, 0) for weight, of in zip(weights, apart, strict=True))
        np.testing.assert_allclose(found[path], expected, atol=5e-6, err_msg=path)
    assert "linear of -1 · plain, " in str(fits)
    tokens = jnp.arange(12, dtype=jnp.int32)[None] % 37
    np.testing.assert_allclose(MODEL(mixed, tokens), MODEL(lora.merge(mixed), tokens), atol=2e-5)


TIED = build(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True).to_dict())
ENDS = {
    "both ends": dict(target_modules=["q_proj", "embed_tokens"]),
    "input": dict(target_modules=["embed_tokens"]),
    "head": dict(target_modules=["lm_head"]),
    "copies": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "copy of both ends": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
}


@functools.cache
def tied_base():
    return jax.jit(TIED.random_params)(jax.random.key(0))


@functools.cache
def at_ends(kind):
    """A tied model's base, and that with an adapter of its embedding, its head or both."""
    start = tied_base()
    params = lora.init(start, jlora.LoraConfig(r=3, **ENDS[kind]), jax.random.key(1))
    if kind == "input":
        params = tree.unflatten({p: leaf for p, leaf in tree.flatten(params).items() if not p.endswith("lora_tied")})
    frozen, trainable = lora.split(params)
    return start, lora.combine(frozen, tree.map_with_path(lambda path, leaf: moved(leaf, len(path + kind)), trainable))


def ends(params):
    """Input embedding and head [V, D] of a tied model once its adapter is merged."""
    merged = lora.merge(params)
    embedding = np.asarray(merged["embed_tokens"]["embedding"])
    return np.stack([embedding, merged["lm_head"]["kernel"].T if "lm_head" in merged else embedding])


PAIRS = [(a, b) for a in ENDS for b in ENDS if a <= b]
# Each kind is in several other pairs, products and copies are in pairs with either.
LIKE_OTHERS = {("copies", "input"), ("copy of both ends", "head"), *((kind, kind) for kind in ENDS)}


@pytest.mark.parametrize(
    ("pair", "weights"),
    [
        pytest.param(pair, weights, marks=[pytest.mark.slow] * (pair in LIKE_OTHERS))
        for pair, weights in zip(PAIRS, itertools.cycle([(1, 1), (0.5, -2)]))
    ],
)
def test_tied_embeddings_and_heads_add_up(pair, weights, tmp_path):
    (start, first), (_, second) = map(at_ends, pair)
    mixed, _ = lora.mix(start, {"a": first, "b": second}, weights, method="linear")
    bare = ends(start)
    expected = bare + sum(w * (ends(one) - bare) for w, one in zip(weights, (first, second), strict=True))
    np.testing.assert_allclose(ends(mixed), expected, atol=1e-5)
    tokens = jnp.arange(12, dtype=jnp.int32)[None] % 37
    merged = TIED(lora.merge(mixed), tokens)
    np.testing.assert_allclose(TIED(mixed, tokens), merged, atol=2e-5)
    jlora.save_adapter(tmp_path, mixed, base="x")
    np.testing.assert_allclose(TIED(jlora.load_adapter(start, tmp_path), tokens), merged, atol=2e-5)


def test_a_copy_and_a_product_of_one_module_are_a_copy(tmp_path):
    copy = dict(target_modules=["q_proj"], modules_to_save=["down_proj"])
    parts = [adapted_as("copy", **copy), adapted_as("biased", target_modules=["down_proj", "q_proj"])]
    mixed, _ = lora.mix(base(), parts, [0.5, 2], method="linear")
    found, (first, second) = changes(mixed), map(changes, parts)
    for path in first.keys() | second.keys():
        expected = 0.5 * first.get(path, 0) + 2 * second.get(path, 0)
        np.testing.assert_allclose(found[path], expected, atol=5e-6, err_msg=path)
    averaged, _ = lora.mix(base(), [parts[0], parts[0], parts[1]], method="ties", density=1.0)
    path = "layers/mlp/down_proj/kernel"
    expected = add_changes([first[path], first[path], second[path]], [1, 1, 1], RULES["ties"], density=1.0)
    np.testing.assert_allclose(changes(averaged)[path], expected, atol=5e-6)
    jlora.save_adapter(tmp_path, mixed, base="x")
    again = changes(jlora.load_adapter(base(), tmp_path))
    assert again.keys() == found.keys()
    for path in found:
        np.testing.assert_allclose(again[path], found[path], atol=1e-6, err_msg=path)
    both = lora.overlay(
        parts[1],
        tree.unflatten(
            tree.flatten(lora.adapter_leaves(parts[1]))
            | {"layers/mlp/down_proj/trained_kernel": parts[0]["layers"]["mlp"]["down_proj"]["trained_kernel"]}
        ),
    )
    with pytest.raises(ValueError, match=r"a trained copy of a module or factors; found both: \['layers/mlp/down_proj"):
        jlora.save_adapter(tmp_path / "both", both)
    with pytest.raises(ValueError, match="down_proj: one adapter copies it or is DoRA, another adds a bias"):
        lora.mix(base(), [parts[0], adapted_as("bias", target_modules=["down_proj"], lora_bias=True)], method="linear")


def test_biases_that_one_trains_and_another_adds_are_one():
    parts = [
        adapted_as("a", target_modules=["q_proj"], bias="lora_only"),
        adapted_as("b", target_modules=["q_proj"], lora_bias=True),
    ]
    first, second = map(changes, parts)
    for method in ("linear", "ties"):
        settings = {"density": 1.0} if method == "ties" else {}
        mixed, _ = lora.mix(base(), parts, [0.5, 2], method=method, **settings)
        path = "layers/self_attn/q_proj/bias"
        expected = add_changes([first[path], second[path]], [0.5, 2], RULES[method], density=1.0)
        np.testing.assert_allclose(changes(mixed)[path], expected, atol=5e-6)
        assert {"trained_bias", "lora_a"} <= mixed["layers"]["self_attn"]["q_proj"].keys()


def test_kernels_of_several_axes_on_both_sides_are_no_stacks():
    keys = jax.random.split(jax.random.key(0), 6)
    params = {"pair": {"kernel": jax.random.normal(keys[0], (3, 5, 2, 4)), "bias": jnp.zeros((2, 4))}}
    start = lora.init(params, jlora.LoraConfig(r=2, target_modules=["pair"]), keys[1])
    assert start["pair"]["lora_a"].shape == (3, 5, 2) and start["pair"]["lora_b"].shape == (2, 2, 4)
    adapters = [
        {"pair": start["pair"] | {"lora_b": jax.random.normal(key, (2, 2, 4)), "lora_scale": jnp.float32(scale)}}
        for key, scale in zip(keys[2:4], (0.5, 2.0), strict=True)
    ]
    for method in ("linear", "cat"):
        mixed, report = lora.mix(params, adapters, [0.7, -0.4], method=method)
        base, *merged = (lora.merge(one)["pair"]["kernel"] for one in (params, *adapters))
        expected = base + 0.7 * (merged[0] - base) - 0.4 * (merged[1] - base)
        np.testing.assert_allclose(lora.merge(mixed)["pair"]["kernel"], expected, atol=1e-5)
        assert [fit.name for fit in report.modules] == ["pair"]


def test_a_mixture_opens_in_peft(three, tmp_path):
    model, params, adapters = three
    mixed, _ = lora.mix(params, adapters, WEIGHTS, method="svd", rank=6)
    jlora.save_adapter(tmp_path, mixed, base="x")
    again = jlora.load_adapter(params, tmp_path)
    for path, leaf in changes(mixed).items():
        np.testing.assert_allclose(changes(again)[path], leaf, atol=1e-6)
    model.load_adapter(str(tmp_path), "mixed")
    tokens = torch.arange(10)[None]
    model.set_adapter("mixed")
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    ours = build(transformers.LlamaConfig(**SIZES).to_dict())(mixed, jnp.arange(10, dtype=jnp.int32)[None])
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def by_hand(rule, values, weights, kept):
    """One number of the result, from the numbers that the changes have there and whether they were kept."""
    kept_values = [value if keep else 0.0 for value, keep in zip(values, kept, strict=True)]
    weighted = [value * weight for value, weight in zip(kept_values, weights, strict=True)]
    if not rule.elect:
        return sum(weighted)
    sign = 1 if sum(weighted) >= 0 else -1
    taking_part = [i for i, value in enumerate(weighted) if np.sign(value) == sign]
    total = sum(weighted[i] for i in taking_part)
    divisor = sum(weights[i] for i in taking_part) or 1
    return total / divisor if rule.average else total


@pytest.mark.parametrize("name", RULES)
def test_rules_written_out(name):
    rule, generator = RULES[name], np.random.default_rng(0)
    values = generator.normal(size=(3, 5, 8)).astype(np.float32)
    density = 0.5
    if rule.prune == "random":  # what was kept shows in the result of one change alone
        draws = [np.random.default_rng(1), np.random.default_rng(1)]
        kept = np.stack([draws[0].random((5, 8)) < density for _ in range(3)])
        found = add_changes(list(values), WEIGHTS, rule, density=density, generator=draws[1])
        values = values / density
    else:
        largest = [np.sort(np.abs(change).ravel())[-20] for change in values]
        kept = np.stack(
            [
                np.abs(c) >= least if rule.prune else np.ones_like(c, bool)
                for c, least in zip(values, largest, strict=True)
            ]
        )
        found = add_changes(list(values), WEIGHTS, rule, density=density)
    expected = [[by_hand(rule, values[:, i, j], WEIGHTS, kept[:, i, j]) for j in range(8)] for i in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_chance_follows_the_seed(three):
    _, params, adapters = three
    settings = dict(method="dare_linear", density=0.5)
    first, again, other = (changes(lora.mix(params, adapters, seed=seed, **settings)[0]) for seed in (0, 0, 1))
    path = "layers/mlp/down_proj/kernel"
    np.testing.assert_array_equal(first[path], again[path])
    assert np.abs(first[path] - other[path]).max() > 0.1
    assert np.abs(first[path][0] - first[path][1]).max() > 0.1


def test_faults_are_named_all_at_once(three):
    _, params, adapters = three
    with pytest.raises(ValueError) as error:
        lora.mix(params, adapters, [1, float("nan")], method="ties", rank=0)
    for words in (
        "weights: found 2, expected one for each of 3",
        "found nan",
        "density: is required by 'ties'",
        "rank is 0",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError) as error:
        lora.mix(
            base(), {"a": adapted("dora"), "b": base(), "c": adapted("rslora")}, method="peft:linear", rank=3, density=2
        )
    for words in (
        "adapter b: found none in the tree",
        "density: found 2, expected none",
        "rank: found 3, expected none",
        "layers/self_attn/q_proj: found ranks that differ",
        "layers/mlp/up_proj: found DoRA",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="method: found 'tie', expected one of cat, svd, linear"):
        lora.mix(params, adapters, method="tie")
    tokens = lora.init(base(), jlora.LoraConfig(r=2, trainable_token_indices=[1]), jax.random.key(0))
    with pytest.raises(ValueError, match="adapter 1: embed_tokens/lora_tokens cannot be mixed"):
        lora.mix(base(), [tokens])
    with pytest.raises(ValueError, match="layers/self_attn/q_proj: found weights of different shapes"):
        lora.mix(
            base(),
            [
                adapters["red"],
                {
                    "layers": {
                        "self_attn": {
                            "q_proj": lora.adapter_leaves(adapted("plain"))["layers"]["self_attn"]["q_proj"]
                            | {"lora_a": jnp.zeros((3, 9, 5))}
                        }
                    }
                },
            ],
        )
