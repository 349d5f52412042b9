"""Weights stored in 8-bit floats with scales: read to the bit as transformers dequantises them."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from jlora import hub, lora, quant, tree

SIZES = dict(
    vocab_size=101, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, head_dim=16
)
SIZES |= dict(num_key_value_heads=3, max_position_embeddings=64)
TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2]], np.int32)
BLOCK = [16, 24]
LINEARS = ("_proj.weight",)


@pytest.fixture
def save(tmp_path):
    """save(block) → a folder of Llama with linears in 8 bits: by blocks, or with one scale a weight, as Ministral 3."""

    def save(block, name="packed", **settings):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, dtype="bfloat16")).bfloat16()
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        packed = {}
        for key, value in load_file(file).items():
            packed |= _packed(key, value, block) if key.endswith(LINEARS) else {key: value}
        save_file(packed, file, {"format": "pt"})
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block} | settings
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    return save


def _packed(name, value, block):
    rows, columns = block or value.shape
    parts = value.float().reshape(value.shape[0] // rows, rows, value.shape[1] // columns, columns)
    scale = parts.abs().amax((1, 3), keepdim=True) / 448 * 1.07
    codes = (parts / scale).reshape(value.shape).to(torch.float8_e4m3fn)
    found = {name: codes, f"{name}_scale_inv": scale[:, 0, :, 0] if block else scale[0, 0, 0, 0]}
    return found if block else found | {name.replace("weight", "activation_scale"): torch.tensor(0.02)}


@pytest.mark.filterwarnings("ignore:.*are stored in 8 bits")
@pytest.mark.parametrize(("block", "scheme"), [(BLOCK, "dynamic"), (None, "static")])
def test_the_values_are_those_of_transformers(save, block, scheme):
    folder = save(block, activation_scheme=scheme)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    )
    model, params = hub.load(folder, dtype="bfloat16")
    expected = theirs.state_dict()
    for path, leaf in tree.flatten(params).items():
        for tensor in hub.checkpoints.names.hub_tensors(path, leaf.shape, "llama"):
            values = np.asarray(leaf[tensor.index])
            values = values.T if tensor.transposed else values
            other = expected[tensor.name]
            assert other.dtype == torch.bfloat16
            np.testing.assert_array_equal(values.view(np.uint16), other.view(torch.int16).numpy().view(np.uint16))
    with torch.no_grad():
        logits = theirs.float()(torch.tensor(TOKENS).long()).logits.numpy()
    ours = tree.map_with_path(lambda _, leaf: leaf.astype(np.float32), params)
    np.testing.assert_allclose(model(ours, TOKENS), logits, atol=1e-4)


def test_it_is_said(save):
    with pytest.warns(UserWarning, match=r"packed: 14 weights are stored in 8 bits \(fp8\); they were read as"):
        hub.load(save(BLOCK))


@pytest.mark.filterwarnings("ignore:.*are stored in 8 bits")
def test_nf4_packs_the_values_and_a_plan_says_so(save):
    folder = save(BLOCK)
    params = hub.load(folder, quant="nf4")[1]
    described = hub.describe(folder, quant="nf4")[1]
    (folder / "model.safetensors").unlink()
    for other in (described, hub.describe(folder, quant="nf4")[1]):
        for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
            assert (one.shape, one.dtype) == (two.shape, two.dtype)
    assert sum(map(quant.is_packed, tree.flatten(params).values())) == 7


@pytest.mark.filterwarnings("ignore:.*are stored in 8 bits")
def test_a_merged_model_is_not_packed(save, tmp_path):
    folder = save(None)
    model, params = hub.load(folder)
    assert hub.checkpoint_dtype(folder) == ml_dtypes.bfloat16 and hub.exact_dtype(folder) == np.float32
    config = lora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    params = lora.init(params, config, jax.random.key(0))
    hub.save_model(tmp_path / "merged", model, params)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with torch.no_grad():
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        logits = opened(torch.tensor(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(logits, model(params, TOKENS), atol=1e-4)


def test_edges_that_a_block_does_not_fill(save):
    """As DeepSeek's: the last block of a row or column is a part."""
    from jlora.hub.checkpoints.fp8 import Scaled
    from jlora.hub.checkpoints.weights import SafetensorsFolder

    folder = save(BLOCK)
    codes = (torch.arange(40 * 50).reshape(40, 50) % 7).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 10.0).reshape(3, 3)
    save_file({"w": codes, "w_scale_inv": scale}, folder / "model.safetensors", {"format": "pt"})
    tensors = SafetensorsFolder(folder).tensors
    found = Scaled("w", tensors["w"], tensors["w_scale_inv"], (16, 24)).read()
    expected = np.kron(scale.numpy(), np.ones((16, 24)))[:40, :50] * codes.float().numpy()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(f"{name}_scale_inv"), "there is no scale_inv beside it"),
        (
            lambda tensors, name: tensors.update({f"{name}_scale_inv": torch.ones(2, 2)}),
            r"its scales have shape \(2, 2\), expected \(3, 2\)",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}_scale_inv": torch.ones(3, 2, dtype=torch.uint8)}),
            "its scales are U8, expected one of F64, F32",
        ),
    ],
)
def test_scales_that_do_not_fit_are_named(save, change, message):
    folder = save(BLOCK)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, "model.layers.1.self_attn.k_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"layers\.1\.self_attn\.k_proj\.weight: {message}"):
        hub.load(folder)
