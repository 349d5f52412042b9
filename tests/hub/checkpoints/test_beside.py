"""Models of several parts: the language model is loaded and tuned, and everything else is written back to the byte."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import jlora
from jlora import hub, lora, models, quant, tree
from jlora.families import FAMILIES
from jlora.hub.checkpoints.beside import alone
from jlora.hub.checkpoints.names import hub_tensors
from jlora.hub.checkpoints.packed import quantizable
from jlora.hub.checkpoints.weights import SafetensorsFolder

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2], [4, 8, 15, 16, 23, 42, 99]], np.int32)
TEXT = dict(
    vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3, head_dim=16
)
TEXT |= dict(num_key_value_heads=1, max_position_embeddings=64, sliding_window=None, eos_token_id=6)
VISION = dict(hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
VISION |= dict(image_size=28)
HYBRID = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=10, linear_value_head_dim=14)
HYBRID |= dict(full_attention_interval=2)
MIXTURE = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=28)
QWEN_VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=48)
QWEN_VISION |= dict(num_position_embeddings=16)
GEMMA4 = dict(global_head_dim=20, sliding_window=5, num_hidden_layers=2, pad_token_id=0)
AUDIO = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, output_proj_dims=24)
AUDIO |= dict(subsampling_conv_channels=[4, 2])
# model_type → (transformers' config class, its fields)
CASES = {
    "gemma3": (
        "Gemma3Config",
        dict(text_config=TEXT | dict(sliding_window=5, query_pre_attn_scalar=16), vision_config=VISION),
    ),
    "mistral3": (
        "Mistral3Config",
        dict(
            text_config=TEXT | dict(model_type="ministral3"),
            vision_config=VISION | dict(model_type="pixtral", head_dim=10),
            tie_word_embeddings=False,
        ),
    ),
    "qwen3_5": ("Qwen3_5Config", dict(text_config=TEXT | HYBRID, vision_config=QWEN_VISION)),
    "qwen3_5_moe": (
        "Qwen3_5MoeConfig",
        dict(text_config=TEXT | HYBRID | MIXTURE, vision_config=QWEN_VISION, tie_word_embeddings=True),
    ),
    "gemma4": (
        "Gemma4Config",
        dict(
            text_config=TEXT | GEMMA4 | dict(hidden_size_per_layer_input=10, vocab_size_per_layer_input=107),
            vision_config=VISION | dict(head_dim=10, num_key_value_heads=2, position_embedding_size=8),
            audio_config=AUDIO,
        ),
    ),
    "muse_glimmer": (
        "MuseGlimmerConfig",
        dict(
            text_config=TEXT | dict(sliding_window=5, pad_token_id=0),
            vision_config=VISION | dict(pos_emb_height=4, pos_emb_width=4),
            out_hidden_size=80,
            projector_hidden_size=20,
        ),
    ),
    "gemma4_unified": (
        "Gemma4UnifiedConfig",
        dict(
            text_config=TEXT | GEMMA4,
            vision_config=dict(patch_size=2, pooling_kernel_size=2, mm_embed_dim=20, mm_posemb_size=6, hidden_size=20),
            audio_config=dict(audio_embed_dim=18),
        ),
    ),
}
EVERY = pytest.mark.parametrize("kind", CASES)


def distinct(kinds, slow=("gemma4_unified", "qwen3_5")):
    """For tests that take long: without `-m slow` not those that are put together as another."""
    return [pytest.param(kind, marks=[pytest.mark.slow] * (kind in slow)) for kind in kinds]


DISTINCT = pytest.mark.parametrize("kind", distinct(CASES))
# Where it does not matter that a language model has experts.
DENSE = pytest.mark.parametrize("kind", distinct(CASES, ("gemma4_unified", "qwen3_5_moe")))


def reference(kind):
    """transformers' model with random weights."""
    name, fields = CASES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**copy.deepcopy(fields))
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.ndim == 1) + 0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def save(tmp_path):
    """save(kind) → the folder that transformers saved the model in."""

    def save(kind, **settings):
        reference(kind).save_pretrained(tmp_path / kind, **settings)
        (tmp_path / kind / "preprocessor_config.json").write_text('{"image_size": 28}')
        (tmp_path / kind / "tokenizer_config.json").write_text("{}")
        return tmp_path / kind

    return save


def opened(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS).long()).logits.numpy()


def contents(folder):
    """name → (dtype, shape, bytes) of every tensor of a folder."""
    found = {}
    for name, info in SafetensorsFolder(folder).tensors.items():
        with info.file.open("rb") as stream:
            stream.seek(info.span[0])
            found[name] = info.dtype, info.shape, stream.read(info.nbytes)
    return found


def others(kind, tensors):
    return {name: value for name, value in tensors.items() if FAMILIES[kind].half.is_other(name)}


def with_adapter(params, targets="all-linear", **settings):
    config = lora.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **settings)
    params = lora.init(params, config, jax.random.key(0))
    return tree.map_with_path(
        lambda path, leaf: jnp.asarray(3 * np.asarray(leaf)) if path.endswith("lora_b") else leaf, params
    )


def adapted_weights(kind, params):
    """The names of the adapted weights in the file of transformers."""
    flat = tree.flatten(params)
    paths = [path.removesuffix("lora_a") + "kernel" for path in flat if path.endswith("/lora_a")]
    names = {tensor.name for path in paths for tensor in hub_tensors(path, flat[path].shape, kind)}
    return {FAMILIES[kind].half.formerly(name) for name in names}


def test_every_such_family_is_tried_here():
    assert {kind for kind, family in FAMILIES.items() if family.half} == set(CASES)


@DISTINCT
def test_a_merge_changes_the_language_model_and_no_byte_of_anything_else(save, tmp_path, kind):
    folder = save(kind)
    model, params = hub.load(folder)
    changed = with_adapter(params)
    hub.save_model(tmp_path / "merged", model, changed)
    before, after = contents(folder), contents(tmp_path / "merged")
    assert after.keys() == before.keys()
    assert len(others(kind, before)) > 10 and others(kind, after) == others(kind, before)
    assert (
        7 * 2
        <= sum(after[name] != before[name] for name in before)
        == sum(".weight" in n for n in before if after[n] != before[n])
    )
    expected = model(changed, TOKENS)
    assert np.abs(expected - model(params, TOKENS)).max() > 0.1
    np.testing.assert_allclose(logits_of(opened(tmp_path / "merged")), expected, atol=1e-3)
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes()


@EVERY
def test_shards_of_any_size_hold_the_same(save, tmp_path, kind):
    folder = save(kind, max_shard_size="40KB")
    model, params = hub.load(folder)
    hub.save_model(tmp_path / "copy", model, params, shard_bytes=50_000)
    assert contents(tmp_path / "copy") == contents(folder)
    for file in (tmp_path / "copy").glob("*.safetensors"):
        assert load_file(file)
    config, source = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "copy", folder))
    field = FAMILIES[kind].half.field
    assert {**config, **source} == config | {field: source[field]}
    assert {**config[field], **source[field]} == config[field]


@EVERY
def test_no_byte_of_the_other_parts_is_read(save, kind):
    folder = save(kind)
    file = folder / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    for info in others(kind, SafetensorsFolder(folder).tensors).values():
        damaged[slice(*info.span)] = b"\xff" * info.nbytes  # NaN, which jlora refuses
    expected = hub.load(folder)[1]
    file.write_bytes(damaged)
    for path, leaf in tree.flatten(hub.load(folder)[1]).items():
        np.testing.assert_array_equal(leaf, tree.flatten(expected)[path])


@EVERY
def test_what_was_left_alone_is_said(save, kind):
    with pytest.warns(UserWarning, match=r"the language model was loaded\. Left alone: \w+ \(\d+ tensors?, [\d,]+"):
        hub.load(save(kind))


@EVERY
def test_a_tensor_that_neither_half_explains_is_named(save, kind):
    folder = save(kind)
    model = opened(folder)
    model.model.register_buffer("drawn", torch.ones(3))
    model.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"does not fit its config\.json \(1 tensor\):\s+unknown (model\.)?drawn \(3,\)"
    ):
        hub.load(folder)


@EVERY
@pytest.mark.parametrize("renamed", ["today", "formerly"])
def test_names_of_either_age_are_read_and_written_back(save, tmp_path, kind, renamed):
    folder, half = save(kind), FAMILIES[kind].half
    expected = hub.load(folder)[1]
    model = opened(folder)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        del state["lm_head.weight"]
    names = {name: getattr(half, renamed)(name) for name in state}
    if renamed == "formerly":
        names = {name: new.removeprefix("model.") if half.is_other(new) else new for name, new in names.items()}
    save_torch({names[name]: value for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
    model, params = hub.load(folder)
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(expected)[path])
    hub.save_model(tmp_path / "copy", model, params)
    if not model.config.experts:  # which transformers has in one tensor in memory
        assert contents(tmp_path / "copy") == contents(folder)
    assert others(kind, contents(tmp_path / "copy")) == others(kind, contents(folder))


@EVERY
def test_a_folder_that_is_gone_or_changed_is_an_error_before_anything_is_written(save, tmp_path, kind):
    folder = save(kind)
    model, params = hub.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["patch_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    for check in (lambda: hub.save_model(tmp_path / "out", model, params), lambda: hub.require_writable(model, params)):
        with pytest.raises(
            ValueError, match=r"has changed since the model was loaded \(vision_config in config\.json\)"
        ):
            check()
    shutil.rmtree(folder)
    for check in (lambda: hub.save_model(tmp_path / "out", model, params), lambda: hub.require_writable(model, params)):
        with pytest.raises(ValueError, match=r"must be copied from .*, which cannot be opened"):
            check()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="are not known: load the model"):
        hub.save_model(tmp_path / "out", models.build(model.config.to_hf()), params)


@DENSE
def test_an_adapter_has_pefts_names_and_leaves_the_tower_alone(save, tmp_path, kind):
    folder = save(kind)
    model, params = hub.load(folder)
    params = with_adapter(params)
    hub.save_adapter(tmp_path / "adapter", params, base=str(folder))
    theirs = peft.PeftModel.from_pretrained(opened(folder), tmp_path / "adapter").eval()
    adapted = {name.split(".lora_")[0] for name, _ in theirs.named_parameters() if ".lora_" in name}
    prefix, half = "base_model.model.", FAMILIES[kind].half
    assert {half.formerly(f"{name.removeprefix(prefix)}.weight") for name in adapted} == adapted_weights(kind, params)
    np.testing.assert_allclose(logits_of(theirs), model(params, TOKENS), atol=1e-3)
    again = hub.load_adapter(lora.strip(params), tmp_path / "adapter")
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(tree.flatten(again)[path], leaf, err_msg=path)


def test_an_adapter_that_reaches_into_the_tower_is_refused_by_name(save, tmp_path):
    """As PEFT makes for "all-linear", or for q_proj, which the tower has too."""
    folder = save("gemma3")
    theirs = peft.get_peft_model(opened(folder), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"vision_tower.*q_proj\.lora_A.*belongs to a part beside the language model"):
        hub.load_adapter(hub.load(folder)[1], tmp_path / "adapter")


@DENSE
def test_trained_copies_and_more_rows_go_to_peft_and_back(save, tmp_path, kind):
    folder = save(kind)
    model, params = hub.load(folder, vocab=107)
    params = with_adapter(params, ["q_proj"], modules_to_save=["language_model.norm"])
    hub.save_adapter(tmp_path / "adapter", params, base=str(folder))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [f"model.{model.config.names.norm.replace('/', '.')}"]
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    embedding = f"base_model.model.{FAMILIES[kind].hub_name(model.config.names.embedding)}.weight"
    assert embedding in names  # as the base has fewer rows
    hub.save_model(tmp_path / "merged", model, params)
    written = opened(tmp_path / "merged")
    assert written.get_input_embeddings().weight.shape[0] == written.config.get_text_config().vocab_size == 107
    np.testing.assert_allclose(logits_of(written), model(params, TOKENS), atol=1e-3)
    assert np.isfinite(model(params, np.array([[1, 106]]))).all()  # the new rows are everywhere


@DISTINCT
def test_packed_folders(save, tmp_path, kind):
    """Packed by jlora or bitsandbytes, the language model only; nothing of the rest is packed by a reader."""
    folder = save(kind)
    model, params = hub.load(folder, quant=jlora.QuantConfig(rules=quantizable("nf4")))
    assert any(map(quant.is_packed, tree.flatten(params).values()))
    hub.save_quantized(tmp_path / "packed", model, params)
    before, after = contents(folder), contents(tmp_path / "packed")
    assert others(kind, after) == others(kind, before)
    skipped = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    parts = {name.removeprefix("model.").split(".")[0] for name in others(kind, before)}
    assert {f"model.{part}" for part in parts} <= set(skipped["llm_int8_skip_modules"])
    _, again = hub.load(tmp_path / "packed")
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    hub.save_model(tmp_path / "unpacked", model, params)
    assert others(kind, contents(tmp_path / "unpacked")) == others(kind, before)


def test_packed_parts_beside_the_language_model(save, tmp_path):
    """As bitsandbytes leaves them when nothing is skipped: copied into a packed folder, refused for another."""
    folder = save("gemma3")
    model, params = hub.load(folder, quant="nf4")
    hub.save_quantized(tmp_path / "packed", model, params)
    file = tmp_path / "packed" / "model.safetensors"
    tensors, tower = load_file(file), "vision_tower.encoder.layers.0.mlp.fc1.weight"
    layer = "language_model.model.layers.0.mlp.up_proj.weight"
    tensors.pop(tower)
    tensors |= {name.replace(layer, tower): value for name, value in tensors.items() if name.startswith(layer)}
    save_file(tensors, file, {"format": "pt"})
    model, params = hub.load(tmp_path / "packed")
    hub.save_quantized(tmp_path / "again", model, params)
    assert contents(tmp_path / "again") == contents(tmp_path / "packed")
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    skipped = set(config["llm_int8_skip_modules"])
    assert "model.vision_tower" not in skipped and tower.removesuffix(".weight") not in skipped
    assert {"model.multi_modal_projector", "vision_tower.encoder.layers.0.mlp.fc2"} <= skipped
    with pytest.raises(ValueError, match=r"beside the language model are packed \(vision_tower\.encoder.*merge into"):
        hub.save_model(tmp_path / "out", model, params)


@EVERY
def test_config_alone_is_enough_for_a_plan(save, kind):
    folder = save(kind)
    _, params = hub.load(folder, quant="nf4")
    (folder / "model.safetensors").unlink()
    _, described = hub.describe(folder, quant="nf4")
    for one, other in zip(jax.tree.leaves(described), jax.tree.leaves(params), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize(
    "kind", distinct(kind for kind in CASES if FAMILIES[kind].half.families[0] in FAMILIES.values())
)
def test_the_language_model_alone_computes_the_same(save, tmp_path, kind):
    model, params = hub.load(save(kind))
    own, leaves = alone(model, params)
    assert own.config.model_type in {name for text in FAMILIES[kind].half.families for name in text.model_types}
    np.testing.assert_array_equal(own(leaves, TOKENS), model(params, TOKENS))
    hub.save_model(tmp_path / "text", own, leaves)
    again, loaded = hub.load(tmp_path / "text")
    assert again.config == jlora.load(tmp_path / "text")[0].config and again.config.folder is None
    np.testing.assert_array_equal(again(loaded, TOKENS), model(params, TOKENS))
    assert alone(own, leaves) == (own, leaves)


def test_a_language_model_that_is_never_alone_is_not_written_alone(save, tmp_path):
    with pytest.raises(ValueError, match="language model of a muse_glimmer model cannot be written alone"):
        hub.save_gguf(tmp_path / "text.gguf", *hub.load(save("muse_glimmer")))


def test_gguf_holds_the_language_model(save, tmp_path):
    model, params = hub.load(save("gemma3"))
    hub.save_gguf(tmp_path / "whole.gguf", model, params, dtype="f32")
    hub.save_gguf(tmp_path / "alone.gguf", *alone(model, params), dtype="f32")
    one, other = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("whole", "alone"))
    assert one.replace(b"whole", b"alone") == other
    adapted = with_adapter(params)
    hub.save_gguf_adapter(tmp_path / "adapter.gguf", model, adapted)
    again, loaded = hub.load(tmp_path / "whole.gguf")
    np.testing.assert_allclose(again(loaded, TOKENS), model(params, TOKENS), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_activation": "mish"}, r"text_config: hidden_act 'mish' is not supported"),
        ({"use_bidirectional_attention": True}, r"text_config\.use_bidirectional_attention True is not supported"),
        ({"rms_norm_eps": "small"}, r"text_config\.rms_norm_eps is 'small', expected"),
        ({"model_type": "llama9"}, r"text_config\.model_type 'llama9' is not supported \(supported: 'gemma3_text'\)"),
        ({"num_key_value_heads": 2}, r"text_config\.num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
    ],
)
def test_what_is_not_supported_is_named_with_its_path(change, message):
    name, fields = CASES["gemma3"]
    config = getattr(transformers, name)(**copy.deepcopy(fields)).to_dict()
    config["text_config"] |= change
    with pytest.raises(ValueError, match=message):
        models.build(config)


def test_settings_that_the_file_leaves_out_are_transformers():
    """The files of Gemma 3 4B name five settings; its vocabulary and heads are those of the class."""
    text = dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34)
    config = {"model_type": "gemma3", "text_config": text | dict(sliding_window=1024), "vision_config": {}}
    ours = models.build(config).config
    theirs = transformers.Gemma3Config(**config).to_dict()
    assert ours == models.build(theirs).config.__class__(**{**vars(models.build(theirs).config), "source": ours.source})
    assert (ours.vocab_size, ours.num_attention_heads, ours.head_dim) == (262_208, 8, 256)


@DENSE
def test_a_recipe_combines_the_language_models(save, tmp_path, kind):
    """And copies the rest from the first; of layers taken from both, config.json gets the new number."""
    folder = save(kind)
    model, params = hub.load(folder)
    hub.save_model(tmp_path / "other", model, with_adapter(params))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    (folder / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(folder)
    recipe = {"merge_method": "linear", "models": [], "dtype": "float32"}
    for path, weight in ((folder, 0.25), (tmp_path / "other", 0.75)):
        recipe["models"].append({"model": str(path), "parameters": {"weight": weight}})
    hub.merge_models(recipe, tmp_path / "mixed")
    one, other, mixed = (contents(path) for path in (folder, tmp_path / "other", tmp_path / "mixed"))
    assert mixed.keys() == one.keys() and others(kind, mixed) == others(kind, one)
    for name in mixed.keys() - others(kind, mixed).keys():
        values = (np.frombuffer(found[name][2], np.float32) for found in (one, other, mixed))
        first, second, third = values
        np.testing.assert_allclose(third, 0.25 * first + 0.75 * second, atol=1e-6)
    slices = [{"sources": [{"model": str(folder), "layer_range": [0, 2]}]}] * 2
    stacked = {"merge_method": "passthrough", "slices": slices}
    if "per_layer_config" in json.loads((folder / "config.json").read_text())["text_config"]:
        with pytest.raises(ValueError, match="not models of one architecture"):  # its layers' sizes go by number
            hub.merge_models(stacked, tmp_path / "deep")
        return
    hub.merge_models(stacked, tmp_path / "deep")
    assert hub.load(tmp_path / "deep")[0].config.num_hidden_layers == 4
    assert others(kind, contents(tmp_path / "deep")) == others(kind, one)
