"""Whole models combined as mergekit's recipes say: its formulas written out, and folders that transformers opens."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file, save_file

from jlora import hub
from jlora.cli.main import main
from jlora.hub import cards

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


def test_the_card_has_the_recipe_without_places_on_this_machine(models, tmp_path):
    recipe = {"merge_method": "linear", "dtype": "float32"}
    recipe["models"] = [{"model": name, "parameters": {"weight": 1.0}} for name in ("one", "two")]
    merged(recipe, models, tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    told = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    names = [models[name].name for name in ("one", "two")]
    assert [entry["model"] for entry in told["models"]] == names and told["merge_method"] == "linear"
    assert str(models["one"].parent) not in card and cards.header_of(tmp_path / "out")["tags"] == ["jlora"]


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


def changed(folder, to, *, settings=None, drop="", add=None):
    """A copy of a model with other settings, without the tensors whose names hold `drop`, with those of `add`."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | (settings or {})
    (to / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    tensors = {name: value for name, value in read(to).items() if not drop or drop not in name} | (add or {})
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


def test_changes_are_of_the_layers_that_the_slice_takes(models, tmp_path):
    def slices(*ranges):
        return [
            {"sources": [{"model": name, "layer_range": list(taken)} for name, taken in part.items()]}
            for part in ranges
        ]

    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "parameters": {"weight": 0.3},
        "slices": slices({"one": (0, 1), "two": (0, 1)}, {"one": (2, 3), "two": (2, 3)}),
    }
    base, one, two = (read(models[name]) for name in ("base", "one", "two"))
    found = merged(recipe, models, tmp_path)
    own, name = "model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    agree({name: found[name]}, {name: base[own] + 0.3 * (one[own] - base[own] + two[own] - base[own])})
    assert own not in found

    recipe["slices"] = slices({"one": (1, 2), "base": (2, 3)})
    found = merged(recipe, models, tmp_path)
    first = "model.layers.0.mlp.up_proj.weight"
    agree({first: found[first]}, {first: base[own] + 0.3 * (one[name] - base[own])})

    one, two, base, deep = (str(models[name]) for name in ("one", "two", "base", "deep"))
    recipe["slices"] = slices({one: (0, 1), two: (1, 2)}, {one: (0, 1), two: (0, 9)}, {deep: (3, 5)})
    with pytest.raises(ValueError, match="the recipe is invalid") as error:
        hub.merge_models(recipe | {"base_model": base}, tmp_path / "other")
    for words in (
        "slices[0]: does not list base_model, and its models take different layers",
        "slices[1].sources[1].layer_range: found [0, 9]",
        f"slices[2]: takes layers [3, 5] of base_model, and {base} has layers 0 to 3",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="its models have different numbers of layers"):
        hub.merge_models(
            {"merge_method": "ties", "base_model": deep, "models": [{"model": one, "parameters": {"weight": 1}}]},
            tmp_path / "other",
        )


WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "layer_types": None}
PHI = {"model_type": "phi", "rope_theta": 5.0}  # of no family that jlora knows


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "ropes[0]: Rope"),
        ({"rms_norm_eps": 0.5}, "norm_eps: "),
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}, "num_attention_heads: "),
        ({"model_type": "llama", "attention_bias": True}, "model_type: "),
        (WINDOWS | {"max_window_layers": 1}, "layers[2]: Layer(window="),
        ({"num_hidden_layers": 2, "layer_types": None}, "config.json has 2 layers, its tensors have 3"),
        (PHI, "model_type: "),
        ({"dtype": "float16", "transformers_version": "4.0", "max_position_embeddings": 99, "eos_token_id": 5}, None),
        ({"_name_or_path": "elsewhere", "use_cache": False, "bos_token_id": 7, "max_window_layers": 2}, None),
    ],
)
@pytest.mark.parametrize("place", ["input", "base"])
def test_models_that_compute_otherwise_are_not_combined(models, tmp_path, settings, fault, place):
    ours, theirs = str(models["one"]), changed(models["two"], tmp_path / "two", settings=settings)
    if place == "input":
        recipe = {"merge_method": "linear", "models": [{"model": ours}, {"model": theirs}]}
    else:
        recipe = {"merge_method": "ties", "base_model": theirs, "models": [{"model": ours}]}
    recipe["parameters"] = {"weight": 1.0}
    if fault is None:
        hub.merge_models(recipe, tmp_path / "out")
        return
    with pytest.raises(ValueError) as error:
        hub.merge_models(recipe, tmp_path / "out")
    assert fault in str(error.value) and theirs in str(error.value)
    assert not (tmp_path / "out").exists()


def test_layers_that_compute_by_their_number_do_not_move(tmp_path):
    sizes = dict(vocab_size=37, n_positions=16, n_embd=16, n_layer=3, n_head=2, scale_attn_by_inverse_layer_idx=True)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    slices = [{"sources": [{"model": str(tmp_path / "gpt2"), "layer_range": span}]} for span in ([0, 2], [1, 3])]
    with pytest.raises(ValueError, match="its layers compute by their number, and some move"):
        hub.merge_models({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")


def test_models_of_an_unknown_family_are_compared_as_they_are_written(models, tmp_path):
    ours = changed(models["one"], tmp_path / "one", settings=PHI)
    recipe = {"merge_method": "linear", "parameters": {"weight": 1.0}}

    def merge(**settings):
        theirs = changed(models["two"], tmp_path / str(len(list(tmp_path.iterdir()))), settings=PHI | settings)
        hub.merge_models(recipe | {"models": [{"model": ours}, {"model": theirs}]}, tmp_path / "out")

    with pytest.raises(ValueError, match=r"differ in config.json:\n  rope_theta: 5.0 and 6.0$"):
        merge(rope_theta=6.0)
    with pytest.warns(UserWarning, match="one config.json has soft, another does not"):
        merge(soft=1)
    merge(dtype="float16", max_position_embeddings=99, eos_token_id=[4, 5], bos_token_id=6)


def test_layers_keep_what_they_compute_in_their_new_places(models, tmp_path):
    """Windows that config.json counts from the bottom do not move along with the layers."""
    one = changed(models["one"], tmp_path / "one", settings=WINDOWS | {"max_window_layers": 2})
    slices = [{"sources": [{"model": one, "layer_range": taken}]} for taken in ([0, 2], [1, 3])]
    with pytest.raises(ValueError, match=r"layers\[2\]: Layer\(window=4.* and Layer\(window=None"):
        hub.merge_models({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    # Those that it lists do, and of a model in the middle the vocabulary does not count.
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    one = changed(models["one"], tmp_path / "listed", settings=WINDOWS | {"layer_types": kinds})
    wide = {name: np.ones((70, 24), np.float32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    two = changed(
        models["two"], tmp_path / "two", settings=WINDOWS | {"layer_types": kinds, "vocab_size": 70}, add=wide
    )
    slices = [{"sources": [{"model": model, "layer_range": [1, 3]}]} for model in (one, two, one)]
    hub.merge_models({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == 3 * kinds[1:]
    with pytest.raises(ValueError, match="vocab_size: 67 and 70"):
        hub.merge_models({"merge_method": "passthrough", "slices": slices[:2]}, tmp_path / "out")


def test_tensors_that_only_some_models_have_are_named(models, tmp_path):
    bias = "layers.1.self_attn.q_proj.bias"
    bare = changed(models["one"], tmp_path / "bare", drop=bias)
    two, base = str(models["two"]), str(models["base"])
    parameters = {"weight": 1.0}

    def fails(recipe, *words):
        with pytest.raises(ValueError, match="do not have the same tensors") as error:
            hub.merge_models(recipe | {"parameters": parameters}, tmp_path / "out")
        assert str(error.value).splitlines()[1:] == [f"  {line}" for line in words]

    fails({"merge_method": "linear", "models": [{"model": bare}, {"model": two}]}, f"{bare} has no model.{bias}")
    fails({"merge_method": "ties", "base_model": base, "models": [{"model": bare}]}, f"{bare} has no model.{bias}")
    fails({"merge_method": "ties", "base_model": bare, "models": [{"model": two}]}, f"{bare} has no model.{bias}")
    headless = changed(models["one"], tmp_path / "headless", drop="lm_head")
    fails(
        {"merge_method": "ties", "base_model": base, "models": [{"model": headless}]},
        f"{headless} has no lm_head.weight",
    )
    # What every loader recomputes, or is a copy by config.json, may be there or not.
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    tied = {"tie_word_embeddings": True}
    one = changed(models["one"], tmp_path / "one", settings=tied, drop="lm_head")
    copied = {"lm_head.weight": read(models["two"])["model.embed_tokens.weight"]}
    old = changed(models["two"], tmp_path / "old", settings=tied, add=buffers | copied)
    recipe = {"merge_method": "linear", "models": [{"model": one}, {"model": old}], "parameters": parameters}
    hub.merge_models(recipe, tmp_path / "out")
    assert read(tmp_path / "out").keys() == read(tmp_path / "one").keys()


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
        "modles: is unknown",
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
        ([{"filtr": "mlp", "value": 1}], "parameters.weight.filtr: is unknown; expected one of value, filter"),
    ):
        fails({"merge_method": "linear", "models": [{"model": one, "parameters": {"weight": weight}}]}, words)
    entry = {"model": "not/looked-for", "parameters": {"weight": 1, "densty": 0.5, "lambda": 2}}
    of_all = {"t": 0.5, "lamda": 1.0, "rescale": True}
    fails(
        {"merge_method": "ties", "base_model": base, "models": [entry, {"model": one, "parameters": 1}]}
        | {"parameters": of_all, "seed": "three"},
        "models[0].parameters.densty: is unknown to ties, which reads weight, density",
        "models[0].parameters.lambda: applies to all models together",
        "models[1].parameters: found 1, expected a mapping",
        "parameters.t: is unknown to ties, which reads weight, density, normalize, lambda",
        "parameters.lamda: is unknown",
        "parameters.rescale: is not supported for ties; leave it out",
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
    entry = {"model": one, "parameters": {"weight": 1.0, "density": -0.1}}
    fails({"merge_method": "ties", "base_model": base, "models": [entry]}, "expected a number in [0, 1]")
    shutil.copytree(models["one"], tmp_path / "wide")
    wide = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | {"vocab_size": 70}, num_hidden_layers=3))
    wide.save_pretrained(tmp_path / "wide")
    both = [{"model": one, "parameters": weights}, {"model": str(tmp_path / "wide"), "parameters": weights}]
    fails({"merge_method": "linear", "models": both}, "vocab_size: 67 and 70")
    misshapen = changed(models["two"], tmp_path / "misshapen", add={"lm_head.weight": np.ones((70, 24), np.float32)})
    both[1] |= {"model": misshapen}
    fails({"merge_method": "linear", "models": both}, "lm_head.weight: (67, 24) in", "(70, 24) in")
    shutil.copytree(models["deep"], tmp_path / "bare")
    path = tmp_path / "bare" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "layer_types"}))
    parts = [{"sources": [{"model": name, "layer_range": [0, 3]}]} for name in (one, str(tmp_path / "bare"))]
    fails({"merge_method": "passthrough", "slices": parts}, "layer_types: ", "has one entry a layer", "bare does not")
    assert main(["merge", f"--recipe={tmp_path / 'none.yaml'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "none.yaml" in capsys.readouterr().err
