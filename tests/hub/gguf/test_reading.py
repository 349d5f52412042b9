"""GGUF files are written here with the gguf package, and transformers' reading of the same file is the judge."""

import gguf
import numpy as np
import pytest
import torch

from jlora import hub
from jlora.hub.gguf.reading import GGUFFile, tokenizer_fields

# 32 values make a block, so every row must hold whole ones.
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
PACKED = {"ffn_up": "Q4_1", "ffn_down": "Q8_0", "attn_q": "Q8_0", "attn_k": "F16", "token_embd": "Q4_1"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192


def write_gguf(path, model, *, rope_freqs=None, skip=(), metadata=None):
    """The model as llama.cpp's converter lays it out: rows of q and k in interleaved rotary order."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name in skip or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array, target = value.numpy(), names.get_name(name, try_suffixes=(".weight", ".bias"))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        kind = next((kind for part, kind in PACKED.items() if part in target and array.ndim == 2), "F32")
        qtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(array), qtype), raw_dtype=qtype)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_by_transformers(path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_equal_transformers(make_llama, tmp_path, tied):
    path = write_gguf(tmp_path / "tiny.gguf", make_llama(**SIZES, tie_word_embeddings=tied))
    state = read_by_transformers(path).state_dict()
    if tied:
        del state["lm_head.weight"]
    source = hub.open_source(tmp_path)
    assert set(source.tensors) == set(state)
    for name, info in source.tensors.items():
        assert info.shape == tuple(state[name].shape)
        np.testing.assert_array_equal(source.read(name), state[name].numpy(), err_msg=name)


def test_config_is_the_one_it_was_written_from(make_llama, tmp_path):
    original = make_llama(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5).config
    file = GGUFFile(
        write_gguf(tmp_path / "tiny.gguf", make_llama(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5))
    )
    for name in (*SIZES, "num_hidden_layers", "vocab_size", "rms_norm_eps", "max_position_embeddings"):
        assert file.config[name] == getattr(original, name), name
    assert file.config["tie_word_embeddings"] is True
    assert file.config["rope_theta"] == original.rope_parameters["rope_theta"]
    assert (file.config["bos_token_id"], file.config["eos_token_id"]) == (1, 2)
    assert file.generation_config == {"bos_token_id": 1, "eos_token_id": 2}


def test_logits_equal_transformers(make_llama, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", make_llama(**SIZES))
    tokens = np.array([[1, 5, 9, 100, 7]], np.int32)
    model, params = hub.load(path)
    with torch.no_grad():
        expected = read_by_transformers(path)(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(model(params, tokens), expected, atol=2e-4, rtol=1e-4)


def test_biases_are_reordered_with_their_rows(make_llama, tmp_path):
    reference = make_llama(**SIZES, attention_bias=True, mlp_bias=True)
    source = hub.open_source(write_gguf(tmp_path / "tiny.gguf", reference))
    assert source.config["attention_bias"] and source.config["mlp_bias"]
    for name, value in reference.state_dict().items():
        if name.endswith("bias"):
            np.testing.assert_array_equal(source.read(name), value.numpy(), err_msg=name)


def llama3_divisors(head_dim: int, theta: float) -> np.ndarray:
    """transformers' own frequencies, as the divisors that GGUF stores."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=96, num_attention_heads=3, head_dim=head_dim)
    config.rope_parameters = {**LLAMA3, "rope_theta": theta}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    return (plain / scaled.numpy()).astype(np.float32)


def test_llama3_scaling_is_recovered_from_its_frequencies(make_llama, tmp_path):
    model = make_llama(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    divisors = llama3_divisors(32, 500000.0)
    assert 1 < np.median(np.unique(divisors)) < 8
    source = hub.open_source(write_gguf(tmp_path / "tiny.gguf", model, rope_freqs=divisors))
    assert source.config["rope_scaling"] == LLAMA3
    divisors[3] *= 1.1
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not Llama 3's rope scaling"):
        hub.open_source(write_gguf(tmp_path / "other.gguf", model, rope_freqs=divisors))


def test_other_scalings(make_llama, tmp_path):
    model = make_llama(**SIZES)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    source = hub.open_source(write_gguf(tmp_path / "linear.gguf", model, metadata=linear))
    assert source.config["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}
    with pytest.raises(ValueError, match=r"no metadata llama\.rope\.scaling\.factor"):
        hub.open_source(write_gguf(tmp_path / "yarn.gguf", model, metadata={"llama.rope.scaling.type": "yarn"}))


def test_a_turn_may_end_with_a_token_of_its_own(make_llama, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", make_llama(**SIZES), metadata={"tokenizer.ggml.eot_token_id": 9})
    assert hub.load(path)[0].config.eos_token_ids == (2, 9)


def test_faults(make_llama, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", make_llama(**SIZES), skip=("model.norm.weight",))
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight \(96,\)"):
        hub.load(path)
    (tmp_path / "short.gguf").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"short\.gguf \(\d+ bytes\) is truncated, damaged or not GGUF"):
        hub.open_source(tmp_path / "short.gguf")
    (tmp_path / "noise.gguf").write_bytes(b"GGML" + b"\x00" * 60)
    with pytest.raises(ValueError, match=r"noise\.gguf \(64 bytes\) is truncated, damaged or not GGUF"):
        hub.open_source(tmp_path / "noise.gguf")


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="has architecture 'mamba'"):
        hub.open_source(tmp_path / "other.gguf")


def test_a_vocabulary_is_not_cut_up_as_slices_of_a_memmap(tmp_path, monkeypatch):
    """Of np.memmap, every word takes three times the time and memory."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_token_list(["a", "bc", ""])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(np.memmap, "__getitem__", lambda *_: pytest.fail("a slice of a memmap"))
    assert tokenizer_fields(tmp_path / "model.gguf") == {"ggml.tokens": ["a", "bc", ""]}
