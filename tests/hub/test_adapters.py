"""Adapter folders as people have them: with GGUF files, tokenizers and names of other bases; and damaged ones."""

import json
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import hub
from jlora.errors import UserError

FILE = "adapter_model.safetensors"


@pytest.fixture
def adapter(llama_folder, tmp_path):
    """(the base's folder, its params, folder of an adapter of theirs)"""
    folder, _ = llama_folder()
    _, params = hub.load(folder)
    config = jlora.LoraConfig(r=4, init_lora_weights=False)
    adapted = jlora.lora.init(params, config, jax.random.key(0))
    hub.save_adapter(tmp_path / "adapter", adapted, base=str(folder))
    return folder, params, tmp_path / "adapter"


def test_gguf_files_beside_an_adapter_are_left_alone(adapter):
    _, params, folder = adapter
    expected = hub.load_adapter(params, folder)
    (folder / "lora.gguf").write_bytes(b"GGUF")
    found = hub.load_adapter(params, folder)
    np.testing.assert_array_equal(
        found["layers"]["mlp"]["up_proj"]["lora_b"], expected["layers"]["mlp"]["up_proj"]["lora_b"]
    )
    with pytest.raises(UserError, match=r"lora\.gguf is a file; give the folder of the adapter"):
        hub.load_adapter(params, folder / "lora.gguf")


def test_one_file_comes_before_a_left_over_index(adapter):
    _, params, folder = adapter
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": {"a": "adapter_model-1.safetensors"}}))
    with pytest.warns(
        UserWarning, match=rf"{FILE} is read; {FILE}\.index\.json and the files that it names are ignored"
    ):
        hub.load_adapter(params, folder)
    (folder / FILE).unlink()
    with pytest.raises(UserError, match="holds its adapter in several files; save it with PEFT"):
        hub.load_adapter(params, folder)


@pytest.mark.parametrize(
    ("rename", "what"),
    [
        (lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."), "_orig_mod"),
        (lambda name: name.replace("base_model.model.", "_orig_mod.base_model.model."), "_orig_mod"),
        (lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."), "_fsdp_wrapped_module"),
        (lambda name: f"module.{name}", "DistributedDataParallel"),
        (lambda name: name.replace(".weight", ".default.weight"), "the adapter's name in memory"),
        (lambda name: name.replace(".weight", ".my-run.weight"), "the adapter's name in memory"),
    ],
)
def test_what_wrappers_leave_in_names_is_said_once(adapter, rename, what):
    _, params, folder = adapter
    tensors = {rename(name): value for name, value in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE)
    with pytest.raises(UserError, match=what) as caught:
        hub.load_adapter(params, folder)
    assert str(caught.value).count("\n") == 0


def test_values_that_are_not_finite_are_refused_by_name(adapter):
    _, params, folder = adapter
    tensors = load_file(folder / FILE)
    for value in tensors.values():
        value.flat[1] = np.nan
    save_file(tensors, folder / FILE)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_proj\.lora_A\.weight holds 1 of 320 values") as caught:
        hub.load_adapter(params, folder)
    assert str(caught.value).splitlines()[3] == f"... and {len(tensors) - 3} more tensors"


def test_another_base_is_said(adapter, edit_json, tmp_path):
    base, params, folder = adapter
    for same in (str(base), "owner/base", "owner/Base/", None):
        edit_json(folder / "adapter_config.json", base_model_name_or_path=same)
        hub.load_adapter(params, folder, base)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="owner/other-7b")
    with pytest.warns(UserWarning, match=r"names the base model owner/other-7b; it is applied to .*base"):
        hub.load_adapter(params, folder, base)
    hub.load_adapter(params, folder)


@pytest.fixture
def tokenizers(adapter, byte_tokenizer):
    """(base's folder, adapter's folder), each with a tokenizer; the adapter's has another template."""
    base, _, folder = adapter
    byte_tokenizer.save_pretrained(base)
    byte_tokenizer.save_pretrained(folder)
    return base, folder


def test_an_adapters_own_tokenizer_is_used_and_said(tokenizers):
    base, folder = tokenizers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = hub.load_tokenizer(base, folder)
        hub.say_unused_tokenizer(own, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|end|>")
    with pytest.warns(UserWarning, match="differs from that of .* in its chat template: the adapter's is used"):
        own = hub.load_tokenizer(base, folder)
    assert own.chat_template == "{{ messages[0]['content'] }}<|end|>"
    with pytest.warns(UserWarning, match="differs from the model's in its chat template: the model's is used"):
        hub.say_unused_tokenizer(hub.load_tokenizer(base), folder)


def test_a_head_of_its_own_is_not_taken_for_a_tied_embedding(llama_folder, tmp_path):
    folder, _ = llama_folder(tie_word_embeddings=True)
    _, params = hub.load(folder)
    config = jlora.LoraConfig(r=4, init_lora_weights=False)
    hub.save_adapter(tmp_path / "adapter", jlora.lora.init(params, config, jax.random.key(0)), base=str(folder))
    file, embedding = tmp_path / "adapter" / FILE, np.asarray(params["embed_tokens"]["embedding"])
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    save_file(load_file(file) | dict(zip(names, (embedding, embedding + 1), strict=True)), file)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding in the same file"):
        hub.load_adapter(params, tmp_path / "adapter")


def test_a_tokenizers_settings_alone_are_no_tokenizer(tokenizers):
    """transformers would make an empty one of them."""
    base, folder = tokenizers
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert hub.load_tokenizer(base, folder)("hello").input_ids == hub.load_tokenizer(base)("hello").input_ids


def test_a_tokenizer_of_an_adapter_that_does_not_open_is_left_aside_and_said(tokenizers):
    base, folder = tokenizers
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.warns(UserWarning, match="its own tokenizer is ignored, the model's is used"):
        found = hub.load_tokenizer(base, folder)
    assert found("hello").input_ids == hub.load_tokenizer(base)("hello").input_ids


def test_an_adapter_without_a_tokenizer_takes_the_models(tokenizers):
    base, folder = tokenizers
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert hub.load_tokenizer(base, folder).chat_template == hub.load_tokenizer(base).chat_template
