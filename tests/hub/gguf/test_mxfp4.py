"""gpt-oss's experts in GGUF, to the bit; the judge is gguf's own unpacking."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import hub, lora, models, quant, tree

SIZES = dict(
    model_type="gpt_oss",
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=5,
    num_experts_per_tok=2,
    head_dim=16,
    sliding_window=4,
)
TOKENS = jnp.arange(1, 10)[None]
KERNELS = ("gate_up_proj", "down_proj")


def packed_model():
    """(model, params) with experts packed in MXFP4."""
    model = models.build(SIZES)
    params = jax.jit(model.random_params)(jax.random.key(0))
    return model, tree.map_with_path(
        lambda path, leaf: quant.quantize(leaf, "mxfp4") if "/experts/" in path and path.endswith("kernel") else leaf,
        params,
    )


def experts(params, kernel):
    return params["layers"]["mlp"]["experts"][kernel]["kernel"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(model, params, their file)."""
    path = tmp_path_factory.mktemp("packed") / "model.gguf"
    model, params = packed_model()
    hub.save_gguf(path, model, params, dtype="f32")
    return model, params, path


def test_the_file_has_the_same_values_in_llama_cpps_blocks(written):
    _, params, path = written
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    rows = {"ffn_gate_exps": ("gate_up_proj", slice(0, None, 2)), "ffn_up_exps": ("gate_up_proj", slice(1, None, 2))}
    for name, (kernel, columns) in (rows | {"ffn_down_exps": ("down_proj", slice(None))}).items():
        for layer in range(3):
            tensor = tensors[f"blk.{layer}.{name}.weight"]
            assert tensor.tensor_type is gguf.GGMLQuantizationType.MXFP4
            expected = np.swapaxes(quant.dequantize(experts(params, kernel)[layer])[..., columns], 1, 2)
            np.testing.assert_array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), expected)


def test_codes_and_scales_come_back(written):
    model, params, path = written
    again, read = jlora.load(path)
    for kernel in KERNELS:
        found, expected = experts(read, kernel), experts(params, kernel)
        assert found.format == "mxfp4" and found.dtype == np.float32
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scales, expected.scales)
    np.testing.assert_allclose(again(read, TOKENS), model(params, TOKENS), rtol=1e-5, atol=1e-5)
    described = hub.describe(path)[1]
    assert jax.tree.map(lambda leaf: leaf.shape, described) == jax.tree.map(lambda leaf: leaf.shape, read)


def test_all_else_can_be_packed_in_another_format(written):
    _, params, path = written
    read = jlora.load(path, quant="int8")[1]
    np.testing.assert_array_equal(experts(read, "down_proj").codes, experts(params, "down_proj").codes)
    assert read["layers"]["self_attn"]["q_proj"]["kernel"].format == "int8"


def test_experts_that_an_adapter_changes_are_not_packed(written, tmp_path):
    model, params, _ = written
    config = jlora.LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    adapted = lora.init(params, config, jax.random.key(1))
    with pytest.warns(UserWarning, match="experts in MXFP4 are written as f16") as warned:
        hub.save_gguf(tmp_path / "model.gguf", model, adapted)
    assert len(warned) == 1
    read = jlora.load(tmp_path / "model.gguf")[1]
    assert quant.format_of(experts(read, "down_proj")) is None
    expected = experts(lora.merge(adapted, dtype=jnp.float32), "down_proj")
    np.testing.assert_allclose(experts(read, "down_proj"), expected, atol=1e-3)


def test_scales_that_stand_for_nan_are_refused(written, tmp_path):
    _, _, path = written
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(path.read_bytes())
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    with damaged.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down_exps\.weight holds 1 of \d+ scales"):
        jlora.load(damaged)


@pytest.mark.slow
def test_llama_cpp_computes_with_the_same_experts(written, llama_cpp):
    """But for its products, whose other factors it rounds to 8 bits."""
    model, params, path = written
    opened = llama_cpp(path)
    opened.eval(TOKENS[0].tolist())
    expected = np.asarray(model(params, TOKENS))[0]
    found = np.array(opened.scores[: TOKENS.shape[1]])
    assert np.max(np.abs(found - expected)) < 2e-2 * np.max(np.abs(expected))
