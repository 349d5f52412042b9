"""Merged folders: transformers opens them and computes the same, whatever was merged or unpacked on the way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from jlora import hub, lora, quant, tree
from jlora.hub import cards
from jlora.hub.checkpoints.writing import save_model
from jlora.lora import LoraConfig

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2]], np.int32)


def opened_logits(folder) -> np.ndarray:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def adapted(params: dict, **settings) -> dict:
    """The params with adapters that change the logits."""
    params = lora.init(params, LoraConfig(r=3, init_lora_weights=False, **settings), jax.random.key(0))
    return tree.map_with_path(lambda path, leaf: 3 * leaf if path.endswith("lora_b") else leaf, params)


@pytest.mark.parametrize("tied", [False, True])
def test_an_unchanged_model_comes_back_bit_for_bit(llama_folder, tmp_path, tied):
    folder, _ = llama_folder(tie_word_embeddings=tied, attention_bias=True)
    model, params = hub.load(folder)
    hub.save_model(tmp_path / "copy", model, params)
    written, original = (load_file(path / "model.safetensors") for path in (tmp_path / "copy", folder))
    assert written.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    config, source = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "copy", folder))
    older = {"torch_dtype": "float32", "rope_theta": 10000.0}  # the same again, as transformers 4 calls it
    assert config == source | older
    generation = [json.loads((p / "generation_config.json").read_text()) for p in (tmp_path / "copy", folder)]
    assert generation[0] == generation[1]


def test_adapters_are_merged(llama_folder, tmp_path):
    model, params = hub.load(llama_folder()[0])
    changed = adapted(params, target_modules=("q_proj", "down_proj", "lm_head"))
    hub.save_model(tmp_path / "merged", model, changed)
    expected = model(changed, TOKENS)
    assert np.abs(expected - model(params, TOKENS)).max() > 0.1
    np.testing.assert_allclose(opened_logits(tmp_path / "merged"), expected, atol=1e-4)


def test_packed_kernels_are_unpacked_and_merged(llama_folder, tmp_path):
    folder, _ = llama_folder()
    rules = ((r"layers/.*/(q_proj|up_proj)/kernel", "nf4"),)
    model, params = hub.load(folder, quant=quant.QuantConfig(rules=rules))
    changed = adapted(params, target_modules=("q_proj",))
    hub.save_model(tmp_path / "merged", model, changed)
    np.testing.assert_allclose(opened_logits(tmp_path / "merged"), model(changed, TOKENS), atol=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_the_dtype_is_kept_and_recorded(llama_folder, tmp_path):
    model, params = hub.load(llama_folder()[0], dtype="bfloat16")
    hub.save_model(tmp_path / "half", model, adapted(params, target_modules=("q_proj",)))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {value.dtype.name for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {"bfloat16"}


def test_shards_and_their_index(llama_folder, tmp_path):
    model, params = hub.load(llama_folder()[0])
    save_model(tmp_path / "many", model, params, shard_bytes=40_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == tree.nbytes(params)
    for shard in shards:
        assert (tmp_path / "many" / shard).stat().st_size < 44_000
    np.testing.assert_allclose(opened_logits(tmp_path / "many"), model(params, TOKENS), atol=1e-4)


def test_the_same_model_has_the_same_bytes(llama_folder, tmp_path):
    model, params = hub.load(llama_folder()[0])
    files = []
    for name in ("one", "two"):
        hub.save_model(tmp_path / name, model, params)
        files.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert files[0] == files[1]


def test_a_model_of_another_size_replaces_all_weight_files(llama_folder, tmp_path):
    model, params = hub.load(llama_folder()[0])
    save_model(tmp_path / "out", model, params, shard_bytes=40_000)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    save_model(tmp_path / "out", model, params)
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["README.md", "config.json", "generation_config.json", "model.safetensors", "notes.txt"]


def test_a_readme_that_jlora_did_not_write_or_that_was_changed_stays(llama_folder, tmp_path):
    (model, params), file = hub.load(llama_folder()[0]), tmp_path / "out" / "README.md"
    hub.save_model(file.parent, model, params)
    card = file.read_text()
    for text, found in (("# Mine\n", "# Mine\n"), (card + "More.\n", card + "More.\n"), (card, "A new card\n")):
        file.write_text(text)
        hub.save_model(file.parent, model, params, card=cards.Card("A new card"))
        assert found in file.read_text()


def tokenizer_with(template):
    """A small tokenizer of transformers' with this chat template."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    made.chat_template = template
    return made


def test_nothing_of_another_tokenizer_is_kept(llama_folder, tmp_path):
    model, params = hub.load(llama_folder()[0])
    out = tmp_path / "out"
    hub.save_model(out, model, params, tokenizer_with({"default": "of old", "tool_use": "of old"}))
    for name in ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "notes.txt"):
        (out / name).write_text("{}")
    hub.save_model(out, model, params)
    assert (out / "tokenizer.model").exists()  # it stays with the tokenizer that it belongs to
    hub.save_model(out, model, params, tokenizer_with(None))
    written = {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in out.iterdir()} == written | {"notes.txt"}
    assert hub.load_tokenizer(out).chat_template is None


def test_named_chat_templates_come_back(llama_folder, tmp_path):
    model, params = hub.load(llama_folder()[0])
    templates = {"default": "as it is", "tool_use": "with tools"}
    hub.save_model(tmp_path / "out", model, params, tokenizer_with(templates))
    assert hub.load_tokenizer(tmp_path / "out").chat_template == templates
    assert (tmp_path / "out" / "additional_chat_templates").stat().st_mode & 0o500 == 0o500


def test_params_of_another_model_are_refused(llama_folder, tmp_path):
    model, params = hub.load(llama_folder()[0])
    params = {**params, "extra": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(47)}}
    del params["lm_head"]
    with pytest.raises(ValueError) as caught:
        hub.save_model(tmp_path / "out", model, params)
    message = str(caught.value)
    assert "missing lm_head.weight (101, 48)" in message
    assert "module 'extra' has no name on the Hub" in message
    assert "model.norm.weight has shape (47,), expected (48,)" in message
    assert not (tmp_path / "out").exists()
