"""Packed folders written here are bitsandbytes' own, and transformers opens them with the same values."""

import json
import warnings

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jlora import hub, lora, quant, tree
from jlora.hub.checkpoints.packed import quantizable, save_quantized
from jlora.hub.checkpoints.weights import SINGLE

WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32}
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}


def packed(folder, format):
    config = quant.QuantConfig(rules=quantizable(format), double_quant=format == "nf4")
    return hub.load(folder, dtype="bfloat16", quant=config)


def opened(folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.BitsAndBytesConfig(**settings) if settings else None
        changes = {"quantization_config": config, "dtype": torch.bfloat16} if settings else {}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **changes)


def dequantised(module) -> np.ndarray:
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB).numpy().T
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float().numpy().T


@pytest.mark.parametrize("sizes", [{}, WHOLE_BLOCKS], ids=["odd sizes", "whole blocks"])
@pytest.mark.parametrize("format", SETTINGS)
def test_the_files_are_those_that_bitsandbytes_writes(llama_folder, tmp_path, format, sizes):
    folder, _ = llama_folder(**sizes)
    opened(folder, **SETTINGS[format]).save_pretrained(tmp_path / "theirs")
    hub.save_quantized(tmp_path / "ours", *packed(folder, format))
    ours, theirs = (load_file(tmp_path / name / SINGLE) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        found = ours[name]
        assert found.dtype == value.dtype, name
        if "quant_state" in name:  # the offset is a mean, summed in another order
            found, value = (json.loads(part.tobytes()) for part in (found, value))
            assert found.pop("nested_offset", 0) == pytest.approx(value.pop("nested_offset", 0), rel=1e-6)
            assert list(found.items()) == list(value.items())
        elif name.endswith("nested_absmax"):
            np.testing.assert_allclose(found, value, rtol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(found, value, err_msg=name)
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert ours["dtype"] == theirs["dtype"]
    same = ("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    for key in same:
        assert ours["quantization_config"][key] == theirs["quantization_config"][key], key
    assert ours["quantization_config"].keys() == theirs["quantization_config"].keys()


@pytest.mark.parametrize("format", SETTINGS)
def test_transformers_opens_it_with_the_same_values(llama_folder, tmp_path, format, parity):
    rules = ((r"layers/1/mlp/.*", None), *quantizable(format))
    model, params = hub.load(llama_folder(**WHOLE_BLOCKS)[0], dtype="bfloat16", quant=quant.QuantConfig(rules=rules))
    hub.save_quantized(tmp_path / "out", model, params)
    theirs = opened(tmp_path / "out")
    for path, leaf in tree.flatten(params).items():
        stack = tree.stack_of(path)
        if stack is None or not path.endswith("/kernel"):
            continue
        for i, layer in enumerate(stack.indices(3)):
            part = jax.tree.map(lambda part, i=i: part[i], leaf)
            name = f"model.layers.{layer}.{stack.rest.removesuffix('/kernel').replace('/', '.')}"
            module = theirs.get_submodule(name)
            if layer == 1 and "mlp" in name:
                np.testing.assert_array_equal(part.astype(jnp.float32), module.weight.float().detach().numpy().T)
            else:
                dense = quant.dequantize(part, jnp.float32 if format == "int8" else None).astype(jnp.float32)
                expected = torch.from_numpy(dequantised(module)).bfloat16().float().numpy()
                np.testing.assert_array_equal(dense, expected, err_msg=name)
    parity("format", f"bitsandbytes {format.partition(' ')[0]}", "out", 0)  # the kernels were equal
    tokens = np.array([[1, 5, 9, 100]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = theirs(torch.tensor(tokens)).logits.float().numpy()
    # bitsandbytes computes with activations in 8 bits too.
    tolerance = 0.1 if format == "int8" else 0.05
    np.testing.assert_allclose(model(params, tokens.astype(np.int32)), logits, atol=tolerance * np.abs(logits).max())


@pytest.mark.parametrize("format", SETTINGS)
def test_it_is_loaded_again_as_it_was(llama_folder, tmp_path, format, byte_tokenizer):
    folder, _ = llama_folder(tie_word_embeddings=True, attention_bias=True)
    model, params = packed(folder, format)
    save_quantized(tmp_path / "out", model, params, byte_tokenizer, shard_bytes=20_000)
    again, loaded = hub.load(tmp_path / "out", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    # The template's end of a turn is written beside the model's own.
    assert set(again.config.eos_token_ids) == {*model.config.eos_token_ids, byte_tokenizer.eos_token_id}
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert hub.load_tokenizer(tmp_path / "out").chat_template == byte_tokenizer.chat_template
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == ["lm_head"]


def test_a_tied_head_that_an_adapter_changed_is_one_of_its_own(llama_folder, tmp_path):
    model, params = packed(llama_folder(**WHOLE_BLOCKS, tie_word_embeddings=True)[0], "nf4")
    config = lora.LoraConfig(r=2, target_modules=("lm_head",), init_lora_weights=False)
    merged = lora.merge(lora.init(params, config, jax.random.key(0)))
    hub.save_quantized(tmp_path / "out", model, merged)
    again, loaded = hub.load(tmp_path / "out", dtype="bfloat16")
    assert not again.config.tie_word_embeddings
    jax.tree.map(np.testing.assert_array_equal, loaded, merged)
    theirs = opened(tmp_path / "out")
    weights = [module.weight.float().detach().numpy() for module in (theirs.lm_head, theirs.model.embed_tokens)]
    np.testing.assert_array_equal(weights[0].T, merged["lm_head"]["kernel"].astype(jnp.float32))
    assert np.abs(weights[0] - weights[1]).max() > 0.01


def test_what_the_format_cannot_hold_is_named(llama_folder, tmp_path):
    rules = (
        (r".*/up_proj/kernel", "int4"),
        (r".*/down_proj/kernel", "nf4"),
        (r".*/gate_proj/kernel", "int8"),
        (r"embed_tokens/embedding", "nf4"),
    )
    model, params = hub.load(llama_folder()[0], quant=quant.QuantConfig(rules=rules))
    params = lora.init(params, lora.LoraConfig(r=2, target_modules=("q_proj",)), jax.random.key(0))
    with pytest.raises(ValueError) as caught:
        hub.save_quantized(tmp_path / "out", model, params)
    message = str(caught.value)
    for fault in (
        "layers/self_attn/q_proj/lora_a: an adapter; merge it",
        "layers/mlp/up_proj/kernel: bitsandbytes has no format 'int4', only nf4, fp4, int8",
        "embed_tokens/embedding: transformers packs the kernels of linears only",
        "packed leaves are int4 and int8 and nf4, but a folder has one format",
    ):
        assert fault in message, fault
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"nothing is packed: jlora\.save_model"):
        hub.save_quantized(tmp_path / "out", *hub.load(llama_folder()[0]))
    with pytest.raises(ValueError, match="bitsandbytes has no format 'int4'"):
        quantizable("int4")
