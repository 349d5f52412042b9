"""Head and embedding, one or two: the logits are transformers', whatever config.json says and the file holds."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jlora import hub
from jlora.errors import UserError
from jlora.hub.checkpoints import tied as tied_module
from jlora.hub.checkpoints import weights
from jlora.hub.checkpoints.weights import SINGLE

TOKENS = np.array([[1, 5, 9, 30, 7, 3, 2]], np.int32)
SIZES = dict(vocab_size=37, bos_token_id=1, eos_token_id=2, pad_token_id=0)
DECODER = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
# Family → (transformers' config, head, embedding); the first is tied by its config.json, the others by default.
FAMILIES = {
    "llama": (transformers.LlamaConfig(**SIZES, **DECODER, tie_word_embeddings=True), "model.embed_tokens"),
    "gemma": (transformers.GemmaConfig(**SIZES, **DECODER, head_dim=12), "model.embed_tokens"),
    "smollm3": (transformers.SmolLM3Config(**SIZES, **DECODER), "model.embed_tokens"),
    "gpt2": (transformers.GPT2Config(**SIZES, n_embd=24, n_layer=2, n_head=2), "transformer.wte"),
}
HEAD = "lm_head.weight"


def reference_logits(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@pytest.fixture(params=FAMILIES)
def tied(request, tmp_path, edit_json):
    """(folder of a tied model whose config.json leaves it to the family's default, its tensors, embedding's name)"""
    config, embedding = FAMILIES[request.param]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tied")
    if request.param != "llama":
        edit_json(tmp_path / "tied" / "config.json", tie_word_embeddings=None)
    return tmp_path / "tied", load_file(tmp_path / "tied" / SINGLE), f"{embedding}.weight"


def assert_as_transformers(folder):
    model, params = hub.load(folder)
    expected = reference_logits(folder)
    np.testing.assert_allclose(model(params, TOKENS), expected, atol=1e-4 * np.abs(expected).max())
    return model, params


def test_a_copied_head_is_the_embedding(tied):
    folder, tensors, embedding = tied
    plain = reference_logits(folder)
    save_file(tensors | {HEAD: tensors[embedding].copy()}, folder / SINGLE)
    _, params = assert_as_transformers(folder)
    assert "lm_head" not in params
    np.testing.assert_array_equal(reference_logits(folder), plain)


def test_a_head_alone_is_the_embedding_too(tied):
    folder, tensors, embedding = tied
    plain = reference_logits(folder)
    tensors[HEAD] = tensors.pop(embedding)
    save_file(tensors, folder / SINGLE)
    assert_as_transformers(folder)
    np.testing.assert_array_equal(reference_logits(folder), plain)


def test_a_head_that_differs_is_read_and_written(tied, tmp_path):
    folder, tensors, embedding = tied
    plain = reference_logits(folder)
    tensors[HEAD] = tensors[embedding][::-1].copy()
    save_file(tensors, folder / SINGLE)
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from .*both are read"):
        model, params = assert_as_transformers(folder)
    expected = reference_logits(folder)
    assert np.abs(expected - plain).max() > 0.1
    hub.save_model(tmp_path / "again", model, params)
    np.testing.assert_allclose(reference_logits(tmp_path / "again"), expected, atol=1e-4 * np.abs(expected).max())


def test_a_copy_of_other_precision_is_a_copy(llama_folder):
    folder, _ = llama_folder(tie_word_embeddings=True)
    tensors = load_file(folder / SINGLE)
    tensors[HEAD] = tensors["model.embed_tokens.weight"].astype(np.float16)
    save_file(tensors, folder / SINGLE)
    assert "lm_head" not in hub.load(folder)[1]


def with_head(folder, change):
    """The folder with a head that is the embedding but for the change; (head, embedding)"""
    tensors = load_file(folder / SINGLE)
    embedding = tensors["model.embed_tokens.weight"]
    tensors[HEAD] = change(embedding.copy())
    save_file(tensors, folder / SINGLE)
    return tensors[HEAD], embedding


def test_a_difference_in_the_last_row_is_found_block_by_block_and_said_once(llama_folder, monkeypatch):
    folder, _ = llama_folder(tie_word_embeddings=True)
    monkeypatch.setattr(tied_module, "BLOCK", 50)

    def last(values):
        values[-1, -1] += 1
        return values

    with_head(folder, last)
    blocks = []
    original = tied_module.read_blocks
    monkeypatch.setattr(tied_module, "read_blocks", lambda *all: (blocks.append(one) or one for one in original(*all)))
    monkeypatch.setattr(weights, "read_tensor", None)
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from") as said:
        found = [hub.read_model(folder).config.tie_word_embeddings for _ in range(3)]
    assert found == [False] * 3
    assert len(said) == 1
    assert max(one.size for one in blocks) <= 50
    count = len(blocks)
    assert count > 4

    def first(values):
        values[0, 0] += 1
        return values

    with_head(folder, first)  # another file in its place: compared anew, and left at the first difference
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from"):
        hub.read_model(folder)
    assert len(blocks) == count + 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_that_are_no_numbers_in_both_are_no_difference(dtype, llama_folder):
    folder, _ = llama_folder(tie_word_embeddings=True)
    tensors = load_file(folder / SINGLE)
    tensors["model.embed_tokens.weight"][2, 3] = np.nan
    save_file(tensors, folder / SINGLE)
    with_head(folder, lambda values: values.astype(dtype))
    assert hub.read_model(folder).config.tie_word_embeddings
    with pytest.raises(UserError, match=r"embed_tokens\.weight holds 1 of"):
        hub.load(folder)
