"""Whole models combined as mergekit's recipes say: its formulas written out, and folders that transformers opens."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file

from jlora import hub
from jlora.cli.main import main

SIZES = dict(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory, byte_tokenizer):
    """Folders of a base and three models that were changed from it: "deep" has another number of layers."""
    folders = {}
    for seed, (name, layers) in enumerate({"base": 3, "one": 3, "two": 3, "deep": 5}.items()):
        torch.manual_seed(seed)
        config = transformers.Qwen2Config(**SIZES, num_hidden_layers=layers, use_sliding_window=False)
        model = transformers.Qwen2ForCausalLM(config)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        byte_tokenizer.save_pretrained(folders[name])
    return folders


def read(folder):
    return load_file(folder / "model.safetensors")


def merged(recipe, models, tmp_path):
    """The tensors of what a recipe makes; names of models stand for their folders."""
    text = yaml.safe_dump(recipe)
    for name, folder in models.items():
        text = text.replace(f"model: {name}\n", f"model: {folder}\n")
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["merge", f"--recipe={tmp_path / 'recipe.yaml'}", f"--out={tmp_path / 'out'}"]) == 0
    return read(tmp_path / "out")


def gradient(values, name):
    """The value of a tensor, given those of three layers: embeddings take the first, what comes after them the last."""
    return values[int(name.split(".")[2])] if ".layers." in name else values[0 if "embed_tokens" in name else -1]


def agree(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_sums(models, tmp_path, normalize):
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": "one", "parameters": {"weight": 0.3}},
            {"model": "two", "parameters": {"weight": [{"filter": "mlp", "value": 0.9}, {"value": [0.2, 0.6]}]}},
        ],
        "parameters": {"normalize": normalize},
    }
    one, two = read(models["one"]), read(models["two"])
    expected = {}
    for name in one:
        weight = 0.9 if "mlp" in name else gradient((0.2, 0.4, 0.6), name)
        total = 0.3 * one[name] + weight * two[name]
        expected[name] = total / (0.3 + weight) if normalize else total
    agree(merged(recipe, models, tmp_path), expected)


def test_slerp_goes_along_the_arc(models, tmp_path):
    recipe = {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "one"}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 1]}, {"value": [0.25, 0.75]}]},
    }
    base, one = read(models["base"]), read(models["one"])
    expected = {}
    for name in base:
        t = gradient((0, 0.5, 1) if "self_attn" in name else (0.25, 0.5, 0.75), name)
        a, b = (tensor[name].astype(np.float64).ravel() for tensor in (base, one))
        lengths = [max(np.linalg.norm(v), 1e-8) for v in (a, b)]
        angle = np.arccos(np.clip(a @ b / lengths[0] / lengths[1], -1, 1))
        straight = np.cos(angle) > 0.9995 or not a.any()
        found = (
            (1 - t) * a + t * b if straight else (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
        )
        expected[name] = found.reshape(base[name].shape)
    found = merged(recipe, models, tmp_path)
    agree(found, expected)
    np.testing.assert_allclose(
        found["model.layers.2.self_attn.q_proj.weight"], one["model.layers.2.self_attn.q_proj.weight"], atol=1e-6
    )


def test_task_arithmetic_and_ties(models, tmp_path):
    entries = [
        {"model": "one", "parameters": {"weight": 0.8, "density": 0.4}},
        {"model": "two", "parameters": {"weight": -0.5, "density": 0.7}},
    ]
    base, one, two = (read(models[name]) for name in ("base", "one", "two"))
    changes = {name: (one[name] - base[name], two[name] - base[name]) for name in base}
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": entries, "parameters": {"lambda": 0.7}}
    (tmp_path / "sum").mkdir()
    agree(
        merged(recipe, models, tmp_path / "sum"),
        {name: base[name] + 0.7 * (0.8 * a - 0.5 * b) for name, (a, b) in changes.items()},
    )

    def pruned(change, density):
        kept = int(density * change.size)
        order = np.argsort(-np.abs(change).ravel(), kind="stable")[:kept]
        return np.where(np.isin(np.arange(change.size), order), change.ravel(), 0).reshape(change.shape)

    expected = {}
    for name, (a, b) in changes.items():
        if not (a.any() or b.any()):  # norms, which nothing has changed
            expected[name] = base[name]
            continue
        weighted = np.stack([0.8 * pruned(a, 0.4), -0.5 * pruned(b, 0.7)])
        majority = np.where(weighted.sum(0) >= 0, 1, -1)
        agreeing = np.sign(weighted) == majority
        divisor = (np.array([0.8, -0.5]).reshape(2, *[1] * a.ndim) * agreeing).sum(0)
        expected[name] = base[name] + (weighted * agreeing).sum(0) / np.where(np.abs(divisor) < 1e-8, 1, divisor)
    (tmp_path / "ties").mkdir()
    agree(merged(recipe | {"merge_method": "ties", "parameters": {}}, models, tmp_path / "ties"), expected)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_a_random_share_of_the_changes(models, tmp_path, method):
    entry = {"model": "one", "parameters": {"weight": 1.0, "density": 0.6}}
    recipe = {"merge_method": method, "base_model": "base", "models": [entry], "seed": 3}
    base, one = read(models["base"]), read(models["one"])
    found = merged(recipe, models, tmp_path)
    kept, places = 0, 0
    for name in base:
        change, whole = found[name] - base[name], one[name] - base[name]
        full = np.abs(change - whole / 0.6) < 1e-5
        assert np.all(full | (np.abs(change) < 1e-6)), name
        if np.abs(whole).max() > 0.01:
            kept, places = kept + np.sum(np.abs(change) > 1e-6), places + whole.size
    assert kept / places == pytest.approx(0.6, abs=0.02)
    again = merged(recipe, models, tmp_path)
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_layers_of_several_models_stand_on_top_of_each_other(models, tmp_path):
    slices = [
        {"sources": [{"model": "one", "layer_range": [0, 2]}]},
        {"sources": [{"model": "deep", "layer_range": [1, 5], "parameters": {"scale": 2.0}}]},
    ]
    found = merged({"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}, models, tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6 and config["dtype"] == "bfloat16"
    assert len(config.get("layer_types", range(6))) == 6
    one, deep = read(models["one"]), read(models["deep"])
    assert found["model.layers.1.mlp.up_proj.weight"].dtype.name == "bfloat16"
    np.testing.assert_allclose(
        found["model.layers.5.mlp.up_proj.weight"].astype(np.float32),
        2 * deep["model.layers.4.mlp.up_proj.weight"],
        rtol=1e-2,
    )
    np.testing.assert_allclose(
        found["model.embed_tokens.weight"].astype(np.float32), one["model.embed_tokens.weight"], rtol=1e-2
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model, params = hub.load(tmp_path / "out", dtype="float32")
    tokens = np.arange(1, 9)[None].astype(np.int32)
    expected = opened(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
    np.testing.assert_allclose(model(params, tokens), expected, atol=1e-4)


def test_tensors_are_written_in_the_type_that_they_are_stored_in(models, tmp_path):
    model, params = hub.load(models["one"])
    hub.save_gguf(tmp_path / "one.gguf", model, params, dtype="f16")
    entry = {"model": str(tmp_path / "one.gguf"), "parameters": {"weight": 1.0}}
    recipe = {"merge_method": "linear", "models": [entry], "tokenizer_source": str(models["one"])}
    hub.merge_models(recipe, tmp_path / "out")
    found, one = read(tmp_path / "out"), read(models["one"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert found["model.norm.weight"].dtype == np.float32  # as GGUF keeps vectors
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(found[name], one[name].astype(np.float16), strict=True)


def test_every_fault_is_named_and_nothing_is_written(models, tmp_path, capsys):
    def fails(recipe, *words):
        with pytest.raises(ValueError) as error:
            hub.merge_models(recipe, tmp_path / "out")
        for word in words:
            assert word in str(error.value)
        assert not (tmp_path / "out").exists()

    one, deep, base = (str(models[name]) for name in ("one", "deep", "base"))
    fails(
        {"merge_method": "tiess", "modles": [], "dtype": "int8"},
        "modles: is not known here",
        "merge_method: found 'tiess'",
        "dtype: found 'int8'",
        "models, slices: one of them is required",
    )
    fails({"merge_method": "ties", "models": [{"model": one}]}, "base_model: is required by ties")
    with pytest.raises(ValueError, match=f"is also the recipe's {one}; choose another place"):
        hub.merge_models({"merge_method": "passthrough", "models": [{"model": one}]}, one)
    fails({"merge_method": "linear", "models": one}, "models: found", "expected a list of models")
    fails({"merge_method": "linear", "models": [{"path": one}]}, "models[0]: found", "expected a mapping with model")
    fails({"merge_method": "passthrough", "slices": [{}]}, "slices[0].sources: found None")
    fails({"merge_method": ["ties"], "slices": []}, "merge_method: found ['ties']", "slices: found [], expected a list")
    twice = [{"model": base, "parameters": {"weight": 1}}] * 2
    fails({"merge_method": "linear", "base_model": base, "models": twice}, "a model is named twice")
    for weight, words in (
        ("much", "models[0].parameters.weight: found 'much', expected a number"),
        ([], "models[0].parameters.weight: found [], expected a number"),
        ([0.5, float("nan")], "found [0.5, nan], expected a number"),
        ([{"filter": "mlp"}], "expected a mapping with value"),
        ([{"filtr": "mlp", "value": 1}], "parameters.weight.filtr: is not known here; known are value, filter"),
    ):
        fails({"merge_method": "linear", "models": [{"model": one, "parameters": {"weight": weight}}]}, words)
    entry = {"model": "not/looked-for", "parameters": {"weight": 1, "densty": 0.5, "lambda": 2}}
    of_all = {"t": 0.5, "lamda": 1.0, "int8_mask": True}
    fails(
        {"merge_method": "ties", "base_model": base, "models": [entry, {"model": one, "parameters": 1}]}
        | {"parameters": of_all, "tokenizer_source": "union", "seed": "three"},
        "models[0].parameters.densty: is not known to ties; known are weight, density",
        "models[0].parameters.lambda: is of all models together",
        "models[1].parameters: found 1, expected a mapping",
        "parameters.t: is not known to ties; known are weight, density, normalize, lambda",
        "parameters.lamda: is not known",
        "parameters.int8_mask: mergekit has it and jlora has not",
        "tokenizer_source: found 'union', but models of different vocabularies are not combined",
        "seed: found 'three'",
    )
    fails({"merge_method": "linear", "models": [entry], "tokenizer_source": "base"}, "but there is no base_model")
    opposite = [{"model": one, "parameters": {"weight": 1}}, {"model": base, "parameters": {"weight": [-1, 1]}}]
    fails({"merge_method": "linear", "models": opposite}, "weights whose sum is 0", "(for model.embed_tokens.weight)")
    weights = {"weight": 1.0}
    fails(
        {"merge_method": "linear", "models": [{"model": one, "parameters": weights}, {"model": deep}]},
        "different numbers of layers",
    )
    fails(
        {"merge_method": "linear", "models": [{"model": one}, {"model": base}]},
        f"parameters.weight of {one}: is required by linear",
        f"parameters.weight of {base}: is required by linear",
    )
    fails(
        {"merge_method": "slerp", "base_model": base, "models": [{"model": base}], "parameters": {"t": 0.5}},
        "slerp goes from base_model to one other, found 0",
    )
    for found, words in (([2, 9], "has layers 0 to 3"), (5, "expected [first, last + 1]")):
        part = {"sources": [{"model": one, "layer_range": found}]}
        fails({"merge_method": "passthrough", "slices": [part]}, f"layer_range: found {found}", words)
    entry = {"model": one, "parameters": {"weight": 1.0, "density": 0}}
    fails({"merge_method": "ties", "base_model": base, "models": [entry]}, "expected a number in (0, 1]")
    shutil.copytree(models["one"], tmp_path / "wide")
    wide = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | {"vocab_size": 70}, num_hidden_layers=3))
    wide.save_pretrained(tmp_path / "wide")
    both = [{"model": one, "parameters": weights}, {"model": str(tmp_path / "wide"), "parameters": weights}]
    fails({"merge_method": "linear", "models": both}, "model.embed_tokens.weight", "(67, 24)", "(70, 24)")
    shutil.copytree(models["deep"], tmp_path / "bare")
    path = tmp_path / "bare" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "layer_types"}))
    parts = [{"sources": [{"model": name, "layer_range": [0, 3]}]} for name in (one, str(tmp_path / "bare"))]
    fails({"merge_method": "passthrough", "slices": parts}, "layer_types: ", "has one entry a layer", "bare has not")
    assert main(["merge", f"--recipe={tmp_path / 'none.yaml'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "none.yaml" in capsys.readouterr().err
