"""mergekit's recipes as model cards have them: other spellings, settings that change nothing, and two more methods."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jlora import hub
from jlora.hub.recipes.methods import METHODS

SIZES = dict(vocab_size=257, hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory, byte_tokenizer):
    """Folders of a base and three models that were changed from it."""
    folders = {}
    for seed, name in enumerate(("base", "one", "two", "three")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**SIZES, num_hidden_layers=1, eos_token_id=0, bos_token_id=None)
        folders[name] = str(tmp_path_factory.mktemp(name))
        transformers.LlamaForCausalLM(config).save_pretrained(folders[name])
        byte_tokenizer.save_pretrained(folders[name])
    return folders


def merged(recipe, out):
    hub.merge_models(recipe, out)
    return load_file(out / "model.safetensors")


def of(models, **parameters):
    return [{"model": models[name], "parameters": dict(parameters)} for name in ("one", "two")]


def test_what_changes_nothing_is_taken_with_a_note(models, tmp_path):
    plain = {"merge_method": "dare_ties", "base_model": models["base"], "models": of(models, weight=0.5, density=0.6)}
    card = plain | {
        "models": of(models, weight="0.5", density=[{"filter": "mlp", "value": "0.6"}, {"value": 0.6}]),
        "parameters": {"int8_mask": True, "rescale": True, "gamma": 0.01},
        "tokenizer": {"source": "union"},
        "chat_template": "auto",
    }
    expected = merged(plain, tmp_path / "plain")
    with pytest.warns(UserWarning, match="int8_mask, rescale, gamma: have no effect on dare_ties"):
        found = merged(card, tmp_path / "card")
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    tokenizers = [hub.load_tokenizer(folder) for folder in (tmp_path / "card", models["base"])]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_a_model_of_density_0_adds_nothing(models, tmp_path):
    for method in ("ties", "dare_linear", "della"):
        one, two = of(models, weight=0.5, density=1.0)
        recipe = {"merge_method": method, "base_model": models["base"]}
        alone = merged(recipe | {"models": [one]}, tmp_path / "alone")
        two["parameters"]["density"] = 0
        both = merged(recipe | {"models": [one, two]}, tmp_path / "both")
        for name, value in alone.items():
            np.testing.assert_allclose(both[name], value, atol=1e-6, err_msg=f"{method} {name}")


def test_the_rest_says_what_to_do(models, tmp_path, byte_tokenizer):
    base, linear = models["base"], {"merge_method": "linear", "models": of(models, weight=1)}

    def fails(recipe, *words):
        with pytest.raises(ValueError, match="recipe is invalid") as caught:
            hub.merge_models(recipe, tmp_path / "out")
        for part in words:
            assert part in str(caught.value)
        assert not (tmp_path / "out").exists()

    entry = {"model": f"{base}+some/lora", "parameters": {"weight": 1}}
    merge_first = f"merge it first (jlora merge --model={base} --adapter=some/lora --out=DIR)"
    fails(linear | {"models": [entry]}, merge_first)
    fails(linear | {"chat_template": "chatml"}, "chat_template: found 'chatml', expected auto, or the template itself")
    asked = {"source": "base", "tokens": {"<|x|>": {}}, "kind": 1}
    fails(linear | {"tokenizer": asked}, "tokenizer.tokens: a merge does not change rows", "tokenizer.kind: is unknown")
    fails(linear | {"tokenizer": {}, "tokenizer_source": base}, "tokenizer, tokenizer_source: give one of them")
    dare = {"merge_method": "dare_ties", "base_model": base, "models": of(models, weight=1, density=0.5)}
    fails(dare | {"parameters": {"rescale": False}}, "rescale: is not supported for dare_ties")
    stock = {"merge_method": "model_stock", "base_model": base, "models": [{"model": models["one"]}]}
    fails(stock, "model_stock needs two models or more besides base_model, found 1")
    della = {"merge_method": "della", "base_model": base, "models": of(models, weight=1, density=0.5, epsilon=0.6)}
    fails(della, "parameters.epsilon: found 0.6 with density 0.5")
    changed = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    changed.add_tokens(["<more>"])
    other = tmp_path / "other"
    transformers.AutoModelForCausalLM.from_pretrained(base).save_pretrained(other)
    changed.save_pretrained(other)
    entries = [*of(models, weight=1), {"model": str(other), "parameters": {"weight": 1}}]
    fails(linear | {"models": entries, "tokenizer_source": "union"}, "differ in 1 token,", "name one model")


@pytest.mark.parametrize("by_row", [False, True])
def test_model_stock(models, tmp_path, by_row):
    """Jang et al. 2024, equation 2, with three models: the mean of the cosines of pairs."""
    names = ("one", "two", "three")
    recipe = {"merge_method": "model_stock", "base_model": models["base"]}
    recipe |= {"models": [{"model": models[name]} for name in names], "parameters": {"filter_wise": by_row}}
    found = merged(recipe, tmp_path / "out")
    base, *others = (load_file(f"{models[name]}/model.safetensors") for name in ("base", *names))
    for name, start in base.items():
        changes = [(other[name] - start).astype(np.float64) for other in others]
        rows = [change.reshape(len(start) if by_row and start.ndim > 1 else 1, -1) for change in changes]
        cosines = []
        for a, b in ((0, 1), (0, 2), (1, 2)):
            product = np.linalg.norm(rows[a], axis=1) * np.linalg.norm(rows[b], axis=1)
            cosines.append(np.sum(rows[a] * rows[b], axis=1) / np.maximum(product, 1e-6))
        cosine = np.mean(cosines, axis=0)
        t = (3 * cosine / (1 + 2 * cosine))[:, None]
        mean = sum(other[name] for other in others) / 3
        expected = t * mean.reshape(len(t), -1) + (1 - t) * start.reshape(len(t), -1)
        np.testing.assert_allclose(found[name], expected.reshape(start.shape), atol=1e-5, err_msg=name)


def test_della_keeps_large_changes_of_a_row_more_often():
    """Deep et al. 2024: kept with density ± epsilon by rank within the row, and divided by that, so that the mean of
    all draws is the whole change.
    """
    base = np.zeros((400, 9), np.float32)
    sizes = np.array([5, 1, 9, 2, 8, 3, 7, 4, 6], np.float32)
    change = np.tile(sizes, (400, 1))
    settings = [{"weight": 1.0, "density": 0.5, "epsilon": 0.4}]
    of_all = {"normalize": False, "lambda": 1.0}
    draws = np.random.default_rng(0)
    found = METHODS["della_linear"].combine([change], base, settings, of_all, draws)
    share = 0.1 + (sizes - 1) * 0.1
    np.testing.assert_allclose((found != 0).mean(axis=0), share, atol=0.08)
    kept = found != 0
    np.testing.assert_allclose(found[kept], np.tile(sizes / share, (400, 1))[kept], rtol=1e-5)
    # Of two that disagree the larger sum's sign is elected, and only what has it is averaged.
    both = METHODS["della"].combine([2 * change, -change], base, settings * 2, of_all | {"normalize": True}, draws)
    assert set(np.unique(np.round(both * share / sizes, 3))) == {-1, 0, 2}
