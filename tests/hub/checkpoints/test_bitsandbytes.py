"""Folders that transformers and bitsandbytes write, opened here: the same packed parts, the same values to the bit."""

import json
import warnings

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.numpy import load_file, save_file

from jlora import hub, quant, sharding, tree
from jlora.hub.checkpoints.bitsandbytes import state_bytes
from jlora.hub.checkpoints.weights import SINGLE

WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32}
TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2]], np.int32)
UP = "model.layers.0.mlp.up_proj.weight"


def quantised(folder, dtype=torch.bfloat16, **settings):
    """The transformers model of the folder, packed by bitsandbytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.BitsAndBytesConfig(**settings)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def opened(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder)


def dequantised(module) -> np.ndarray:
    """The kernel [D, N] of a bitsandbytes module (before any eval forward, which repacks it in place)."""
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB).numpy().T
    if not isinstance(module, bitsandbytes.nn.Linear4bit):
        return weight.detach().float().numpy().T
    state, absmax = weight.quant_state, weight.quant_state.absmax
    if state.nested:
        absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    # The fast CPU kernel reads wrong scales when a block straddles rows.
    values = _dequantize_4bit_compute(weight.data.ravel(), absmax, state.code, 64, state.shape, state.dtype)
    return values.float().numpy().T


def assert_same_kernels(params, reference):
    """Every kernel is, dequantised, what bitsandbytes makes of it; returns the formats by layer and path."""
    formats = {}
    total = reference.config.num_hidden_layers
    for path, leaf in tree.flatten(params).items():
        stack = tree.stack_of(path)
        if not path.endswith("/kernel") or stack is None:
            continue
        for i, layer in enumerate(stack.indices(total)):
            part = jax.tree.map(lambda part, i=i: part[i], leaf)
            name = stack.rest.removesuffix("/kernel")
            module = reference.get_submodule(f"model.layers.{layer}." + name.replace("/", "."))
            dense = quant.dequantize(part) if quant.is_packed(part) else part
            np.testing.assert_array_equal(np.asarray(dense, np.float32), dequantised(module), err_msg=f"{layer} {name}")
            packed = "int8" if isinstance(part, quant.PackedInt8) else None
            formats[layer, name] = part.format if isinstance(part, quant.Packed4bit) else packed
    return formats


@pytest.mark.parametrize("sizes", [{}, WHOLE_BLOCKS], ids=["odd sizes", "whole blocks"])
@pytest.mark.parametrize(
    ("settings", "format"),
    [
        ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4"),
        ({"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}, "fp4"),
    ],
    ids=["nf4 nested", "fp4"],
)
def test_four_bit_checkpoints(llama_folder, tmp_path, sizes, settings, format, parity):
    reference = quantised(llama_folder(**sizes)[0], load_in_4bit=True, **settings)
    reference.save_pretrained(tmp_path / "packed")
    _, params = hub.load(tmp_path / "packed")
    formats = assert_same_kernels(params, reference)
    assert len(formats) == 21 and set(formats.values()) == {format}
    parity("format", f"bitsandbytes {format}", "in", 0)  # the kernels were equal
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and (kernel.offset is not None) == settings["bnb_4bit_use_double_quant"]
    assert params["lm_head"]["kernel"].dtype == jnp.float32


def test_int8_checkpoints(llama_folder, tmp_path, parity):
    reference = quantised(llama_folder()[0], load_in_8bit=True)
    reference.save_pretrained(tmp_path / "packed")
    model, params = hub.load(tmp_path / "packed", dtype="float32")
    assert set(assert_same_kernels(params, reference).values()) == {"int8"}
    parity("format", "bitsandbytes int8", "in", 0)  # the kernels were equal
    dense = tree.map_with_path(lambda _, leaf: quant.dequantize(leaf) if quant.is_packed(leaf) else leaf, params)
    np.testing.assert_allclose(model(params, TOKENS), model(dense, TOKENS), atol=1e-4)


def test_layers_that_differ_are_stacked_apart(llama_folder, tmp_path):
    skip = ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn"]
    folder, _ = llama_folder(num_hidden_layers=4)
    reference = quantised(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    reference.save_pretrained(tmp_path / "packed")
    model, params = hub.load(tmp_path / "packed")
    assert [name for name in params if name.startswith("layers")] == ["layers@0-0", "layers@1-1", "layers@2-3"]
    formats = assert_same_kernels(params, reference)
    plain = {key for key, format in formats.items() if format is None}
    assert plain == {(1, "mlp/down_proj")} | {(1, f"self_attn/{name}_proj") for name in "qkvo"}
    dense = tree.map_with_path(lambda _, leaf: quant.dequantize(leaf) if quant.is_packed(leaf) else leaf, params)
    np.testing.assert_allclose(model(params, TOKENS), model(dense, TOKENS), atol=1e-3)


def test_four_and_eight_bits_in_one_folder(llama_folder, tmp_path):
    folder, _ = llama_folder()
    four = quantised(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    eight = quantised(folder, load_in_8bit=True)
    four.save_pretrained(tmp_path / "packed")
    eight.save_pretrained(tmp_path / "eight")
    name = "model.layers.2.mlp.up_proj"
    mine = {key: value for key, value in load_file(tmp_path / "packed" / SINGLE).items() if not key.startswith(name)}
    taken = {key: value for key, value in load_file(tmp_path / "eight" / SINGLE).items() if key.startswith(name)}
    save_file(mine | taken, tmp_path / "packed" / SINGLE)
    _, params = hub.load(tmp_path / "packed")
    four.set_submodule(name, eight.get_submodule(name))
    assert assert_same_kernels(params, four)[2, "mlp/up_proj"] == "int8"


def test_conv1d_checkpoints(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=3, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    reference = quantised(tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    reference.save_pretrained(tmp_path / "packed")
    _, params = hub.load(tmp_path / "packed")
    for i, block in enumerate(reference.transformer.h):
        leaf = jax.tree.map(lambda part, i=i: part[i], params["h"]["attn"]["c_attn"]["kernel"])
        np.testing.assert_array_equal(np.asarray(quant.dequantize(leaf), np.float32), dequantised(block.attn.c_attn))


def test_bytes_may_be_kept_in_a_wider_type(llama_folder, tmp_path):
    folder, _ = llama_folder()
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantised(folder, **settings).save_pretrained(tmp_path / "bytes")
    quantised(folder, bnb_4bit_quant_storage=torch.bfloat16, **settings).save_pretrained(tmp_path / "wide")
    assert load_file(tmp_path / "wide" / SINGLE)[UP].dtype.name == "bfloat16"
    loaded = [hub.load(tmp_path / name)[1] for name in ("bytes", "wide")]
    jax.tree.map(np.testing.assert_array_equal, *loaded)


@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_mesh_changes_the_placement_only(llama_folder, tmp_path, settings):
    folder, _ = llama_folder(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    quantised(folder, **settings).save_pretrained(tmp_path / "packed")
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    here, spread = hub.load(tmp_path / "packed")[1], hub.load(tmp_path / "packed", mesh=mesh)[1]
    jax.tree.map(np.testing.assert_array_equal, here, spread)
    codes = spread["layers"]["mlp"]["up_proj"]["kernel"].codes
    assert codes.addressable_shards[0].data.size * 8 == codes.size


@pytest.fixture
def packed_folder(llama_folder, tmp_path):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantised(llama_folder()[0], **settings).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def test_every_fault_is_named_before_anything_is_read(packed_folder):
    tensors = load_file(packed_folder / SINGLE)

    def state(layer, **changes):
        name = f"model.layers.{layer}.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
        tensors[name] = state_bytes(json.loads(tensors[name].tobytes()) | changes)

    state(0, blocksize=128)
    state(1, nested_blocksize=128, dtype="float8")
    state(2, quant_type="af4")
    del tensors["model.layers.0.mlp.down_proj.weight.absmax"]
    del tensors["model.layers.1.mlp.down_proj.weight.quant_state.bitsandbytes__nf4"]
    tensors["model.layers.2.mlp.down_proj.weight.quant_map"] = np.linspace(-1, 1, 16, dtype=np.float32)
    tensors["model.layers.0.mlp.gate_proj.weight.nested_quant_map"] = np.zeros(256, np.float32)
    tensors["model.layers.1.mlp.gate_proj.weight"] = np.zeros((7, 1), np.uint8)
    tensors["model.embed_tokens.weight"] = np.zeros((101, 48), np.int8)
    save_file(tensors, packed_folder / SINGLE)
    with pytest.raises(ValueError) as caught:
        hub.load(packed_folder)
    message = str(caught.value)
    for fault in (
        "layers.0.mlp.up_proj.weight: blocksize is 128, expected 64",
        "layers.1.mlp.up_proj.weight: nested_blocksize is 128, expected 256",
        "layers.1.mlp.up_proj.weight: dtype is 'float8', expected one of float32, float16, bfloat16",
        "layers.2.mlp.up_proj.weight: quant_type is 'af4', expected 'nf4'",
        "layers.0.mlp.down_proj.weight: absmax (60,) is missing",
        "layers.1.mlp.down_proj.weight: beside it lie absmax, nested_absmax, nested_quant_map, quant_map, expected one",
        "layers.2.mlp.down_proj.weight: quant_map is not bitsandbytes' for nf4: values differ by",
        "layers.0.mlp.gate_proj.weight: nested_quant_map is not bitsandbytes' for nf4",
        "layers.1.mlp.gate_proj.weight: the codes are U8 (7, 1), expected 1920 bytes",
        "embed_tokens.weight: beside it lie nothing",
    ):
        assert fault in message, fault
    assert message.count("\n") == 10


def test_maps_may_differ_in_their_last_bit(packed_folder):
    before = hub.load(packed_folder)[1]
    tensors = load_file(packed_folder / SINGLE)
    name = f"{UP}.nested_quant_map"
    tensors[name] = np.nextafter(tensors[name], np.float32(2))
    tensors[name][127] = 0
    save_file(tensors, packed_folder / SINGLE)
    jax.tree.map(np.testing.assert_array_equal, before, hub.load(packed_folder)[1])


def test_a_packed_checkpoint_is_not_packed_again(packed_folder):
    with pytest.raises(ValueError, match=r"already quantised \(nf4\) and is loaded as it is"):
        hub.load(packed_folder, quant="nf4")


def test_packed_tensors_must_fit_the_model(packed_folder, edit_json):
    edit_json(packed_folder / "config.json", intermediate_size=81)
    with pytest.raises(ValueError, match=r"up_proj.weight has shape \(80, 48\), expected \(81, 48\)"):
        hub.load(packed_folder)
