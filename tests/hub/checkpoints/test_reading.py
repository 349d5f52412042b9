"""Loading: logits as transformers computes them, whatever the shards, dtype or placement; faults before any reading."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jlora import hub, quant, sharding, tree
from jlora.errors import UserError
from jlora.hub.checkpoints.reading import float_dtype
from jlora.hub.checkpoints.weights import SINGLE

# Two kernels are enough, one that a mesh splits over its inputs and one over its outputs: each compiles a second.
PACK_MLP = quant.QuantConfig(rules=((r".*/(up|down)_proj/kernel", "nf4"),))
TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2], [8, 8, 4, 50, 60, 70, 80]], np.int32)


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def assert_same(left: dict, right: dict) -> None:
    left, right = (dict(zip(*tree_parts(side), strict=True)) for side in (left, right))
    assert left.keys() == right.keys()
    for path, value in left.items():
        assert value.dtype == right[path].dtype, path
        np.testing.assert_array_equal(np.asarray(value), np.asarray(right[path]), err_msg=path)


def tree_parts(params: dict) -> tuple[list[str], list]:
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return [jax.tree_util.keystr(path) for path, _ in found], [value for _, value in found]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 3, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
    ids=["untied", "tied", "biases", "multi-head"],
)
def test_logits_equal_transformers(llama_folder, changes):
    folder, reference = llama_folder(max_shard_size="40KB", **changes)
    model, params = hub.load(folder)
    np.testing.assert_allclose(model(params, TOKENS), torch_logits(reference), atol=2e-5, rtol=2e-5)
    assert ("lm_head" in params) == (not changes.get("tie_word_embeddings", False))


def test_every_leaf_has_the_asked_dtype(llama_folder):
    folder, reference = llama_folder()
    _, params = hub.load(folder, dtype="bfloat16")
    leaves = tree.flatten(params)
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}
    wanted = reference.state_dict()["model.layers.2.mlp.down_proj.weight"].bfloat16().float().numpy().T
    np.testing.assert_array_equal(np.asarray(leaves["layers/mlp/down_proj/kernel"][2], np.float32), wanted)


def test_a_bfloat16_checkpoint_is_loaded_exactly(llama_folder):
    folder, _ = llama_folder()
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE)
    _, params = hub.load(folder, dtype=jnp.float32)
    np.testing.assert_array_equal(
        params["embed_tokens"]["embedding"], tensors["model.embed_tokens.weight"].astype(np.float32)
    )


def test_dtypes():
    assert float_dtype(None) == jnp.float32  # on the CPU of this test
    assert float_dtype("bfloat16") == float_dtype(jnp.bfloat16) == jnp.bfloat16
    for wrong in ("int8", "half-ish", "float64"):
        with pytest.raises(ValueError, match="expected one of bfloat16, float16, float32"):
            float_dtype(wrong)


@pytest.mark.parametrize(
    ("kind", "written", "exact"),
    [
        ("f16", "float16", "float16"),
        ("bf16", "bfloat16", "bfloat16"),
        ("f32", "float32", "float32"),
        ("q8_0", "bfloat16", "float32"),
    ],
)
def test_a_model_without_a_dtype_has_that_of_its_matrices(kind, written, exact, llama_folder, tmp_path):
    model, params = hub.load(llama_folder(hidden_size=64, intermediate_size=96, num_attention_heads=2)[0])
    hub.save_gguf(tmp_path / "model.gguf", model, params, dtype=kind)
    found = [function(tmp_path / "model.gguf").name for function in (hub.checkpoint_dtype, hub.exact_dtype)]
    assert found == [written, exact]


def test_matrices_of_two_dtypes_fit_into_float32(llama_folder):
    folder, model = llama_folder()
    model.to(torch.float16).model.embed_tokens.to(torch.bfloat16)
    model.save_pretrained(folder)
    assert hub.exact_dtype(folder).name == "float32"


def test_config_json_names_the_dtype_to_write(llama_folder, edit_json):
    folder, _ = llama_folder()  # stored in float32
    for named, written in (("bfloat16", "bfloat16"), (None, "float32"), ("float8", "float32")):
        edit_json(folder / "config.json", dtype=named)
        assert (hub.checkpoint_dtype(folder).name, hub.exact_dtype(folder).name) == (written, "float32")


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({}, "float32"), ({"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}, "bfloat16")],
    ids=["odd sizes", "whole blocks"],
)
def test_nf4_equals_quantising_the_whole(llama_folder, changes, dtype):
    folder, _ = llama_folder(**changes)
    _, dense = hub.load(folder, dtype=dtype)
    _, packed = hub.load(folder, dtype=dtype, quant=PACK_MLP)

    def pack(path, leaf):
        return quant.quantize(leaf) if quant.leaf_format(path, PACK_MLP) else leaf

    assert quant.is_packed(packed["layers"]["mlp"]["up_proj"]["kernel"])
    assert_same(packed, tree.map_with_path(pack, dense))


@pytest.mark.parametrize("quantised", [None, PACK_MLP], ids=["dense", "nf4"])
def test_a_mesh_changes_the_placement_only(llama_folder, quantised):
    folder, _ = llama_folder(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    model, here = hub.load(folder, quant=quantised)
    _, spread = hub.load(folder, quant=quantised, mesh=mesh)
    assert_same(here, spread)
    shardings = sharding.tree_shardings(here, mesh)
    for path, value in zip(*tree_parts(spread), strict=True):
        wanted = dict(zip(*tree_parts(shardings), strict=True))[path]
        assert value.sharding.is_equivalent_to(wanted, value.ndim), path
    kernel = spread["layers"]["mlp"]["up_proj"]["kernel"]
    part = kernel.codes if quantised else kernel
    assert part.addressable_shards[0].data.size * 8 == part.size
    np.testing.assert_allclose(model(here, TOKENS), model(spread, TOKENS), atol=1e-3)


def test_nf4_packs_the_stacked_kernels(llama_folder):
    folder, _ = llama_folder(num_hidden_layers=1)
    _, params = hub.load(folder, quant="nf4")
    packed = {path for path, leaf in tree.flatten(params).items() if quant.is_packed(leaf)}
    assert packed == {path for path in tree.flatten(params) if path.startswith("layers/") and path.endswith("/kernel")}


def test_a_quant_config_decides_by_path(llama_folder):
    folder, _ = llama_folder()
    config = quant.QuantConfig(rules=((r".*/down_proj/kernel", "nf4"), (r"lm_head/kernel", "nf4")), double_quant=False)
    _, params = hub.load(folder, quant=config)
    packed = {path for path, leaf in tree.flatten(params).items() if quant.is_packed(leaf)}
    assert packed == {"layers/mlp/down_proj/kernel", "lm_head/kernel"}
    assert params["lm_head"]["kernel"].nested_absmax is None


def test_tied_models_may_carry_a_head_and_old_buffers(llama_folder):
    folder, reference = llama_folder(tie_word_embeddings=True)
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(10, np.float32)
    save_file(tensors, folder / SINGLE)
    model, params = hub.load(folder)
    np.testing.assert_allclose(model(params, TOKENS), torch_logits(reference), atol=2e-5, rtol=2e-5)


def test_misfits_are_refused(llama_folder, edit_json):
    folder, _ = llama_folder()
    edit_json(folder / "config.json", num_hidden_layers=4, intermediate_size=81)
    with pytest.raises(ValueError) as caught:
        hub.load(folder)
    message = str(caught.value)
    assert "missing model.layers.3.mlp.down_proj.weight (48, 81)" in message
    assert "model.layers.2.mlp.up_proj.weight has shape (80, 48), expected (81, 48)" in message
    assert "model.layers.0.self_attn" not in message


def test_unknown_models_and_packed_checkpoints_are_refused(llama_folder, edit_json):
    folder, _ = llama_folder()
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"already quantised \(gptq\); give the original checkpoint"):
        hub.load(folder)
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\), but no tensor is packed"):
        hub.load(folder)
    edit_json(folder / "config.json", quantization_config=None, model_type="mamba")
    with pytest.raises(ValueError, match="model_type 'mamba' is not supported"):
        hub.load(folder)
    with pytest.raises(ValueError, match="quant='nf5' is unknown"):
        edit_json(folder / "config.json", model_type="llama")
        hub.load(folder, quant="nf5")


def test_texts_end_where_the_generation_config_says(llama_folder, edit_json):
    folder, _ = llama_folder()
    edit_json(folder / "generation_config.json", eos_token_id=[7, 9])
    assert hub.load(folder)[0].config.eos_token_ids == (7, 9)
    (folder / "generation_config.json").unlink()
    assert hub.load(folder)[0].config.eos_token_ids == (2,)


ROPES = dict(
    rope_scaling={"rope_type": "linear", "factor": 4.0},
    rope_parameters={"rope_type": "dynamic", "factor": 8.0, "rope_theta": 77.0},
)
SMALL = dict(vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2)
SMALL |= dict(num_key_value_heads=2, head_dim=24)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt_neox", "phi3"])
def test_rotary_settings_that_disagree_are_taken_as_transformers_takes_them(kind, tmp_path, edit_json):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "base")
    longrope = {"rope_type": "longrope", "short_factor": [2.0] * 12, "long_factor": [3.0] * 12}
    both = ROPES if kind != "phi3" else ROPES | {"rope_scaling": longrope}
    edit_json(tmp_path / "base" / "config.json", **both)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    expected = torch_logits(reference)
    assert np.abs(expected - torch_logits(model.eval())).max() > 0.01
    model, params = hub.load(tmp_path / "base")
    np.testing.assert_allclose(model(params, TOKENS), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=10**11), "vocab_size is 100000000000, expected a whole number from 1"),
        (dict(vocab_size=101.5, hidden_size="48"), r"hidden_size is '48', .*\n  vocab_size is 101\.5, expected"),
        (
            dict(num_hidden_layers=5000),
            "45,003 tensors, the checkpoint holds 30: check the numbers of layers",
        ),
        (dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected a whole number from 1 to 10,000"),
        (dict(hidden_size=2**31 - 1), r"model\.norm\.weight has shape \(48,\), expected \(2147483647,\)"),
        (dict(num_attention_heads=0), "num_attention_heads is 0, expected"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan, expected a finite number"),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": "1e4"}), "rotary parameter rope_theta is '1e4'"),
        (dict(tie_word_embeddings="no"), "tie_word_embeddings is 'no', expected true or false"),
        (dict(quantization_config={"quant_method": "bitsandbytes"}), "delete the entry quantization_config"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_values_that_no_model_has_are_refused_by_name(changes, message, llama_folder, edit_json):
    folder, _ = llama_folder()
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        hub.load(folder)


@pytest.mark.parametrize("ends", [["a"], "ab", [[1]], 1.5])
def test_ends_of_texts_are_tokens(ends, llama_folder, edit_json):
    folder, _ = llama_folder()
    edit_json(folder / "generation_config.json", eos_token_id=ends)
    with pytest.raises(UserError, match=r"generation_config\.json.*\n.*eos_token_id is .* expected a whole number"):
        hub.load(folder)
