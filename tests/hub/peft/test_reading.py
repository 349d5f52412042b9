"""Adapters in both directions, with PEFT as the judge; and strictness where PEFT says nothing."""

import hashlib
import json
import warnings

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from jlora import hub, lora, quant, sharding, tree
from jlora.lora import LoraConfig

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2]], np.int32)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "alpha differs from r": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]},
    "all linears": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"down_proj": 7, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"up_proj": 5, "model.layers.2.mlp.gate_proj": 24},
    },
    "rslora": {"r": 8, "lora_alpha": 16, "target_modules": ["o_proj"], "use_rslora": True},
    "some layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "regular expression": {"r": 4, "lora_alpha": 8, "target_modules": r".*\.1\..*(up|down)_proj"},
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "k_proj"], "lora_dropout": 0.1},
    "excluded": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
}


def make_peft(model, **settings):
    """A PeftModel with random A and B."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return adapted


def save_peft(adapted, path):
    """PEFT's own writer, which warns that it stores a copy of an adapted head."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        adapted.save_pretrained(path)


def open_peft(path):
    """The base model named in the folder with its adapter; PEFT only warns where tensors are missing."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.AutoPeftModelForCausalLM.from_pretrained(path).eval()


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def randomise(params: dict) -> dict:
    """The params with random adapters, zero where a layer's rank ends."""

    def change(path, leaf):
        if not path.endswith("lora_b"):
            return leaf
        module = path.removesuffix("/lora_b")
        ranks = flat.get(f"{module}/lora_rank", np.full(leaf.shape[:-2], leaf.shape[-2]))
        used = np.arange(leaf.shape[-2]) < np.asarray(ranks)[..., None]
        noise = np.asarray(jax.random.normal(jax.random.key(len(path)), leaf.shape))
        return jax.numpy.asarray(0.3 * noise * used[..., None], leaf.dtype)

    flat = tree.flatten(params)
    return tree.map_with_path(change, params)


@pytest.fixture
def base(llama_folder):
    """(folder, transformers model, jlora model, params)"""
    folder, reference = llama_folder()
    return folder, reference, *hub.load(folder)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_peft_adapter_gives_the_same_logits_here(base, tmp_path, settings):
    _, reference, model, params = base
    plain = torch_logits(reference)
    adapted = make_peft(reference, **settings)
    save_peft(adapted, tmp_path / "adapter")
    loaded = hub.load_adapter(params, tmp_path / "adapter")
    expected = torch_logits(adapted)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(model(loaded, TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_an_adapter_written_again_gives_the_same_logits_in_peft(base, tmp_path, settings):
    folder, reference, model, params = base
    save_peft(make_peft(reference, **settings), tmp_path / "from_peft")
    loaded = hub.load_adapter(params, tmp_path / "from_peft")
    hub.save_adapter(tmp_path / "adapter", loaded, base=str(folder))
    opened = open_peft(tmp_path / "adapter")
    np.testing.assert_allclose(torch_logits(opened), model(loaded, TOKENS), atol=1e-4)
    again = hub.load_adapter(params, tmp_path / "adapter")
    for path, leaf in tree.flatten(loaded).items():
        np.testing.assert_array_equal(leaf, tree.flatten(again)[path], err_msg=path)
    assert tree.flatten(again).keys() == tree.flatten(loaded).keys()


def test_an_adapter_made_here_gives_the_same_logits_in_peft(base, tmp_path):
    folder, _, model, params = base
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        rank_pattern=(("layers.1.mlp.up_proj", 6),),
        alpha_pattern=(("v_proj", 2.5),),
    )
    params = randomise(lora.init(params, config, jax.random.key(0)))
    hub.save_adapter(tmp_path / "adapter", params, base=str(folder))
    opened = open_peft(tmp_path / "adapter")
    np.testing.assert_allclose(torch_logits(opened), model(params, TOKENS), atol=1e-4)
    assert opened.peft_config["default"].r == 4
    assert opened.peft_config["default"].rank_pattern == {"model.layers.1.mlp.up_proj": 6}


def test_the_config_says_what_other_readers_look_for(base, tmp_path):
    params = lora.init(base[3], LoraConfig(r=4, lora_alpha=6, target_modules=("v_proj", "k_proj")), jax.random.key(0))
    hub.save_adapter(tmp_path / "adapter", params, base="owner/model")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/model",
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": ["k_proj", "v_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    assert wanted.items() <= config.items()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.dtype.name for value in tensors.values()} == {"float32"}
    assert tensors["base_model.model.model.layers.2.self_attn.k_proj.lora_A.weight"].shape == (4, 48)
    assert tensors["base_model.model.model.layers.2.self_attn.k_proj.lora_B.weight"].shape == (20, 4)
    assert "base_model: owner/model\n" in (tmp_path / "adapter" / "README.md").read_text()


def test_the_same_adapter_has_the_same_bytes(base, tmp_path):
    params = lora.init(base[3], LoraConfig(r=4), jax.random.key(0))
    digests = []
    for name in ("one", "two"):
        hub.save_adapter(tmp_path / name, params, base="owner/model")
        files = sorted((tmp_path / name).iterdir())
        digests.append([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
    assert digests[0] == digests[1]
    assert [name for name, _ in digests[0]] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_nothing_is_compiled_to_write_one(base, tmp_path, caplog):
    params = lora.init(base[-1], LoraConfig(r=4, target_modules="all-linear"), jax.random.key(0))
    jax.clear_caches()
    with jax.log_compiles():
        hub.save_adapter(tmp_path / "adapter", params)
    assert not [record.message for record in caplog.records if "Compiling" in record.message]


def test_layers_without_an_adapter_have_rank_zero(base, tmp_path):
    _, reference, _, params = base
    save_peft(make_peft(reference, **SETTINGS["some layers"]), tmp_path / "adapter")
    module = hub.load_adapter(params, tmp_path / "adapter")["layers"]["mlp"]["up_proj"]
    np.testing.assert_array_equal(module["lora_rank"], [4, 0, 4])
    np.testing.assert_array_equal(module["lora_scale"], [2, 0, 2])
    assert not np.any(module["lora_a"][1]) and not np.any(module["lora_b"][1])
    assert "lora_a" not in hub.load_adapter(params, tmp_path / "adapter")["layers"]["mlp"]["down_proj"]


def test_a_changed_copy_of_the_head_takes_its_place_as_in_peft(base, tmp_path):
    import peft
    import transformers

    folder, reference, model, params = base
    save_peft(make_peft(reference, **SETTINGS["head"]), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"][3, 5] += 1
    save_file(tensors, file)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = torch_logits(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval())
    np.testing.assert_allclose(model(hub.load_adapter(params, tmp_path / "adapter"), TOKENS), expected, atol=1e-4)


def test_an_adapter_takes_the_place_of_another(base, tmp_path):
    _, reference, model, params = base
    old = lora.init(params, LoraConfig(r=2, lora_dropout=0.5), jax.random.key(0))
    adapted = make_peft(reference, **SETTINGS["rslora"])
    save_peft(adapted, tmp_path / "adapter")
    loaded = hub.load_adapter(old, tmp_path / "adapter")
    np.testing.assert_allclose(model(loaded, TOKENS), torch_logits(adapted), atol=1e-4)
    assert {path.split("/")[-2] for path in tree.flatten(loaded) if lora.is_adapter(path)} == {"o_proj"}


def test_packed_and_placed_params(llama_folder, tmp_path):
    folder, _ = llama_folder()
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    rules = ((r".*/q_proj/kernel", "nf4"),)
    _, params = hub.load(folder, quant=quant.QuantConfig(rules=rules), mesh=mesh)
    made = lora.init(params, LoraConfig(r=4, target_modules=("q_proj", "up_proj")), jax.random.key(0))
    hub.save_adapter(tmp_path / "adapter", made)
    loaded = hub.load_adapter(params, tmp_path / "adapter")
    for path, leaf in tree.flatten(loaded).items():
        if lora.is_adapter(path):
            np.testing.assert_array_equal(leaf, tree.flatten(made)[path])
            assert leaf.sharding.is_equivalent_to(sharding.leaf_sharding(path, leaf, mesh), leaf.ndim), path


def test_every_misfit_is_listed_and_nothing_is_loaded(base, tmp_path):
    _, reference, _, params = base
    save_peft(make_peft(reference, **SETTINGS["alpha differs from r"]), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, prefix = load_file(file), "base_model.model.model.layers"
    del tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"]
    tensors[f"{prefix}.1.self_attn.q_proj.lora_B.weight"] = np.ones((61, 4), np.float32)
    tensors[f"{prefix}.1.mlp.up_proj.lora_A.weight"] = np.ones((4, 48), np.float32)
    tensors[f"{prefix}.9.self_attn.q_proj.lora_A.weight"] = np.ones((4, 48), np.float32)
    tensors["model.layers.0.self_attn.v_proj.lora_A.weight"] = np.ones((4, 48), np.float32)
    tensors[f"{prefix}.0.self_attn.q_proj.lora_magnitude_vector"] = np.ones(60, np.float32)
    save_file(tensors, file)
    with pytest.raises(ValueError) as caught:
        hub.load_adapter(params, tmp_path / "adapter")
    message = str(caught.value)
    assert f"missing {prefix}.0.self_attn.q_proj.lora_A.weight (4, 48)" in message
    assert f"{prefix}.1.self_attn.q_proj.lora_B.weight has shape (61, 4), expected (60, 4)" in message
    assert f"unknown {prefix}.1.mlp.up_proj.lora_A.weight (4, 48): adapter_config.json does not target" in message
    assert f"unknown {prefix}.9.self_attn.q_proj.lora_A.weight (4, 48): the model has no such linear" in message
    assert "unknown model.layers.0.self_attn.v_proj.lora_A.weight (4, 48): PEFT's names begin with" in message
    assert f"unknown {prefix}.0.self_attn.q_proj.lora_magnitude_vector (60,)" in message
    assert len(message.splitlines()) == 7


def test_unsupported_features_are_all_named(base, tmp_path, edit_json):
    _, reference, _, params = base
    save_peft(make_peft(reference, **SETTINGS["rslora"]), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    changes = {
        "arrow_config": {"top_k": 2},
        "kasa_config": {"beta": 1.0},
        "alora_invocation_tokens": [1, 2],
        "layer_replication": [[0, 2]],
        "init_lora_weights": "pissa_niter_4",
        "r": 0,
        "peft_type": "LOHA",
    }
    edit_json(config, **changes)
    with pytest.raises(ValueError, match="cannot be applied") as caught:
        hub.load_adapter(params, tmp_path / "adapter")
    assert all(name in str(caught.value) for name in changes)


def test_unknown_fields_are_a_warning(base, tmp_path, edit_json):
    _, reference, _, params = base
    save_peft(make_peft(reference, **SETTINGS["rslora"]), tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", trained_by="someone")
    with pytest.warns(UserWarning, match="does not know are ignored: trained_by"):
        hub.load_adapter(params, tmp_path / "adapter")


@pytest.mark.parametrize("unused", [None, False, 0])
def test_values_that_say_nothing_are_as_if_left_out(base, tmp_path, edit_json, unused):
    _, reference, _, params = base
    save_peft(make_peft(reference, **SETTINGS["rslora"]), tmp_path / "adapter")
    expected = hub.load_adapter(params, tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", exclude_modules=unused, target_modules=unused)
    assert jax.tree.structure(hub.load_adapter(params, tmp_path / "adapter")) == jax.tree.structure(expected)


def test_missing_files(base, tmp_path):
    _, reference, _, params = base
    with pytest.raises(ValueError, match="there is no adapter in these params"):
        hub.save_adapter(tmp_path / "none", params)
    assert not (tmp_path / "none").exists()
    save_peft(make_peft(reference, **SETTINGS["rslora"]), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"only adapter_model\.bin, a pickle"):
        hub.load_adapter(params, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors in"):
        hub.load_adapter(params, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json in"):
        hub.load_adapter(params, tmp_path / "adapter")


def test_an_existing_adapter_is_replaced_only_by_a_whole_one(base, tmp_path, monkeypatch):
    params = lora.init(base[3], LoraConfig(r=4), jax.random.key(0))
    target = tmp_path / "adapter"
    hub.save_adapter(target, params)
    (target / "notes.txt").write_text("mine")
    before = (target / "adapter_model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("jlora.hub.peft.writing.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            hub.save_adapter(target, params, base="other")
    assert (target / "adapter_model.safetensors").read_bytes() == before
    hub.save_adapter(target, lora.init(base[3], LoraConfig(r=2), jax.random.key(0)))
    assert (target / "adapter_model.safetensors").read_bytes() != before
    assert (target / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_folder_of_something_else_is_left_alone(base, tmp_path):
    params = lora.init(base[3], LoraConfig(r=4), jax.random.key(0))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"has no adapter_config\.json, so it is left alone"):
        hub.save_adapter(tmp_path / "thesis", params)
    hub.save_adapter(tmp_path / "adapter", params)
    card = tmp_path / "adapter" / "README.md"
    card.write_text(card.read_text() + "My words.\n")
    hub.save_adapter(tmp_path / "adapter", params)
    assert card.read_text().endswith("My words.\n")
    card.write_text("# Not of jlora\n")
    with pytest.raises(FileExistsError, match=r"adapter that jlora did not write, so it is left alone; .*force=True"):
        hub.save_adapter(tmp_path / "adapter", params)
    hub.save_adapter(tmp_path / "adapter", params, force=True)
    hub.save_adapter(tmp_path / "adapter", params)
