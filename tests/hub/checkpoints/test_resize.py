"""A base with more rows for tokens: as transformers resizes it, and adapters of it that PEFT writes and reads."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import jlora
from jlora import hub, tree
from jlora.hub.gguf.reading import tokenizer_fields
from jlora.hub.peft.reading import WEIGHTS
from jlora.train import resolve

ROWS, MORE = 64, 5
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def make(folder, tied, **settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=ROWS, tie_word_embeddings=tied, **SIZES)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, **settings)
    return str(folder)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("base"), request.param)


def ids_up_to(rows):
    ids = np.random.default_rng(rows).integers(0, rows, (2, 9))
    ids[0, :3] = range(rows - 3, rows)
    return ids


def resized_reference(folder, rows):
    """transformers' model with so many rows, those it draws set to the mean that it draws them around."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = [
        layer.weight.detach().clone() for layer in (reference.get_input_embeddings(), reference.get_output_embeddings())
    ]
    reference.resize_token_embeddings(rows)
    with torch.no_grad():
        for layer, old in zip(
            (reference.get_input_embeddings(), reference.get_output_embeddings()), before, strict=True
        ):
            drawn = layer.weight[ROWS:]
            assert torch.allclose(drawn, old.mean(0).expand_as(drawn), atol=0.05)  # it draws closely around the mean
            layer.weight[ROWS:] = old.mean(0)
    return reference.eval()


def logits_of(reference, ids):
    with torch.no_grad():
        return reference(torch.from_numpy(ids)).logits.numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["one file", "shards", "gguf", "on a mesh"])
def test_new_rows_are_transformers(form, base, tmp_path):
    reference = resized_reference(base, ROWS + MORE)
    source, mesh = base, None
    if form == "shards":
        source = tmp_path / "shards"
        transformers.AutoModelForCausalLM.from_pretrained(base).save_pretrained(source, max_shard_size="10KB")
        assert (source / "model.safetensors.index.json").is_file()
    if form == "gguf":
        pytest.importorskip("gguf")
        source = tmp_path / "m.gguf"
        hub.save_gguf(source, *jlora.load(base, dtype="float32"), dtype="f32")
    if form == "on a mesh":
        mesh = jlora.make_mesh(jlora.MeshConfig(data=8))
    model, params = jlora.load(source, dtype="float32", mesh=mesh, vocab=ROWS + MORE)
    assert hub.read_model(source, ROWS + MORE).config == model.config
    ids = ids_up_to(ROWS + MORE)
    assert_close(model(params, jnp.asarray(ids)), logits_of(reference, ids))


def test_a_resized_model_is_written_with_its_rows(base, tmp_path):
    model, params = jlora.load(base, dtype="float32", vocab=ROWS + MORE)
    jlora.save_model(tmp_path, model, params)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == ROWS + MORE
    ids = ids_up_to(ROWS + MORE)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(model(params, jnp.asarray(ids)), logits_of(reference, ids))
    again, loaded = jlora.load(tmp_path, dtype="float32")
    assert tree.flatten(loaded).keys() == tree.flatten(params).keys()
    assert again.config.vocab_size == ROWS + MORE


def test_packed_layers_do_not_hinder_it(base):
    model, params = jlora.load(base, quant="int8", vocab=ROWS + MORE)
    assert params["embed_tokens"]["embedding"].shape == (ROWS + MORE, 16)
    assert np.isfinite(model(params, jnp.asarray(ids_up_to(ROWS + MORE)))).all()


@pytest.mark.parametrize("vocab", [ROWS - 1, 0, -3, "more", True])
def test_rows_that_cannot_be_are_refused(vocab, base):
    fault = f"found {vocab!r}, expected a number of rows" if vocab != ROWS - 1 else f"{vocab}: .* has {ROWS} rows"
    for call in (jlora.load, hub.read_model):
        with pytest.raises(jlora.UserError, match=f"vocab.*{fault}"):
            call(base, vocab=vocab)
    settings = {"model": {"path": base, "resize_vocab": vocab}, "data": {"path": "d"}, "train": {"steps": 1}}
    if vocab != ROWS - 1:
        with pytest.raises(jlora.UserError, match="resize_vocab"):
            resolve(settings)


KINDS = {
    "linears": dict(target_modules=["q_proj"]),
    "token rows": dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [ROWS, ROWS + 1]}),
    "the embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "a trained copy": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
}


def peft_model(base, settings, saves_head):
    """PEFT's model on a base that was given more rows, every weight of the adapter random."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(ROWS + MORE)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[ROWS:] = head[:ROWS].mean(0)  # of an adapted embedding's base PEFT does not save the head
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())[: 1 + saves_head]:
            layer.weight[ROWS:] += 0.2 * torch.randn(MORE, layer.weight.shape[1])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return adapted


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_pefts_brings_its_new_rows(kind, base, tmp_path):
    adapted = peft_model(base, KINDS[kind], kind != "the embedding")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(tmp_path)
    model, params = jlora.load(base, dtype="float32")
    with pytest.raises(jlora.UserError, match=f"{ROWS + MORE} rows.*has {ROWS}.*--vocab={ROWS + MORE}"):
        jlora.load_adapter(params, tmp_path)
    model, params = jlora.load(base, dtype="float32", vocab=ROWS + MORE)
    ids = ids_up_to(ROWS + MORE)
    assert_close(model(jlora.load_adapter(params, tmp_path), jnp.asarray(ids)), logits_of(adapted, ids))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
@pytest.mark.parametrize("said", [{"save_embedding_layers": True}, {}], ids=["said", "seen"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_resized_base_opens_in_peft(kind, said, base, tmp_path):
    model, params = jlora.load(base, dtype="float32", vocab=ROWS + MORE)
    settings = dict(KINDS[kind], r=2, init_lora_weights=False)
    if "trainable_token_indices" in settings:
        settings["trainable_token_indices"] = [ROWS, ROWS + 1]
    params = jlora.lora.init(params, jlora.LoraConfig(**settings), jax.random.key(0))
    jlora.save_adapter(tmp_path, params, base=base, **said)
    assert any("embed_tokens" in name for name in load_file(tmp_path / WEIGHTS))
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference.resize_token_embeddings(ROWS + MORE)
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path).eval()
    ids = ids_up_to(ROWS + MORE)
    assert_close(model(params, jnp.asarray(ids)), logits_of(adapted, ids))
    _, again = jlora.load(base, dtype="float32", vocab=ROWS + MORE)
    assert_close(model(jlora.load_adapter(again, tmp_path), jnp.asarray(ids)), logits_of(adapted, ids))


def own_rows(base, kind, path):
    """PEFT's model on a base whose embedding and head are not its checkpoint's, saved with them."""
    settings = KINDS[kind] | ({"trainable_token_indices": [3, 5]} if kind == "token rows" else {})
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
        # A tied head is changed with the embedding; an adapted embedding's is not saved by PEFT.
        for layer in layers[: 1 if model.config.tie_word_embeddings or kind == "the embedding" else 2]:
            layer.weight += 0.2 * torch.randn_like(layer.weight)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(path, save_embedding_layers=True)
    return adapted


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_an_adapter_brought_are_saved_with_it(kind, base, tmp_path):
    adapted = own_rows(base, kind, tmp_path / "theirs")
    ids = ids_up_to(ROWS)
    expected = logits_of(adapted, ids)
    model, params = jlora.load(base, dtype="float32")
    for fold in (False, True):
        jlora.save_adapter(tmp_path / "ours", jlora.load_adapter(params, tmp_path / "theirs"), base=base, fold=fold)
        assert_close(model(jlora.load_adapter(params, tmp_path / "ours"), jnp.asarray(ids)), expected)
        opened = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert_close(logits_of(peft.PeftModel.from_pretrained(opened, tmp_path / "ours").eval(), ids), expected)


def test_rows_of_the_base_itself_are_not_saved(base, tmp_path):
    _, params = jlora.load(base, dtype="float32")
    plain = jlora.lora.init(params, jlora.LoraConfig(r=2, target_modules=["q_proj"]), jax.random.key(0))
    for folder, more in ((tmp_path / "plain", {}), (tmp_path / "copies", {"save_embedding_layers": True})):
        jlora.save_adapter(folder, plain, base=base, **more)
        jlora.save_adapter(tmp_path / "again", jlora.load_adapter(params, folder), base=base)
        assert not any("embed" in name or "head" in name for name in load_file(tmp_path / "again" / WEIGHTS))


def test_what_mixes_adapters_keeps_the_mark_of_the_base_that_they_share(base, tmp_path):
    own_rows(base, "linears", tmp_path)
    model, params = jlora.load(base, dtype="float32")
    own = jlora.load_adapter(params, tmp_path)
    half, _ = jlora.lora.mix(own, {"own": own}, [0.5])
    jlora.save_adapter(tmp_path / "half", half, base=base)
    ids = jnp.asarray(ids_up_to(ROWS))
    assert_close(model(jlora.load_adapter(params, tmp_path / "half"), ids), model(half, ids))
    bank = jlora.lora.Bank.of(own, {"own": own})
    assert_close(model(bank.alone("own"), ids), model(own, ids))


def test_llama_cpp_has_no_place_for_them(base, tmp_path):
    pytest.importorskip("gguf")
    own_rows(base, "linears", tmp_path)
    model, params = jlora.load(base, dtype="float32")
    with pytest.raises(jlora.UserError, match=r"embed_tokens: weights that came with the adapter.*merge"):
        hub.save_gguf_adapter(tmp_path / "a.gguf", model, jlora.load_adapter(params, tmp_path))


def test_adapters_that_brought_rows_do_not_lie_beside_others(base, tmp_path):
    adapted = peft_model(base, KINDS["linears"], saves_head=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(tmp_path)
    _, params = jlora.load(base, dtype="float32", vocab=ROWS + MORE)
    own = jlora.load_adapter(params, tmp_path)
    plain = jlora.lora.init(params, jlora.LoraConfig(r=2, target_modules=["q_proj"]), jax.random.key(0))
    bank = jlora.lora.Bank.of(params, {"plain": plain}, places=2)
    for call in (
        lambda: jlora.lora.Bank.of(params, {"own": own}),
        lambda: bank.add("own", own),
        lambda: jlora.lora.mix(params, {"own": own, "plain": plain}),
        lambda: jlora.lora.mix(params, {"own": jlora.lora.adapter_leaves(own), "plain": plain}),
        lambda: jlora.lora.stack({"own": own, "plain": plain}),
    ):
        with pytest.raises(jlora.UserError, match=r"own: embed_tokens/.* is not the base's"):
            call()


def test_a_gguf_file_made_of_one_has_a_token_for_every_row(byte_tokenizer, tmp_path):
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=257, tie_word_embeddings=True, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    hub.save_gguf(tmp_path / "one.gguf", *jlora.load(tmp_path / "m"), byte_tokenizer, dtype="f32")
    model, params = jlora.load(tmp_path / "one.gguf", vocab=257 + MORE)
    hub.save_gguf(tmp_path / "two.gguf", model, params, tmp_path / "one.gguf", dtype="f32")
    tokens = tokenizer_fields(tmp_path / "two.gguf")["ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == jlora.load(tmp_path / "two.gguf")[0].config.vocab_size == 257 + MORE
    assert jlora.load_tokenizer(tmp_path / "two.gguf")("abc")["input_ids"] == byte_tokenizer("abc")["input_ids"]
