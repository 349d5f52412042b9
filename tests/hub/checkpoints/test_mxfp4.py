"""gpt-oss's packed experts: taken over, trained upon and written again, bit by bit; transformers is the judge."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import jlora
from jlora import hub, lora, quant, tree
from jlora.cli.main import main
from jlora.errors import UserError
from jlora.hub.checkpoints.methods import METHODS

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2, 11]], np.int32)
SIZES = dict(
    vocab_size=260,
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
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
KERNELS = ("gate_up_proj", "down_proj")
FILE = "model.safetensors"


def save_packed(folder, dtype=torch.float32):
    """A folder as gpt-oss is published: experts in MXFP4, by scales of no particular rule; and all of its tensors."""
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tensors = load_file(folder / FILE)
    random = np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(KERNELS)]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = random.integers(0, 256, (*shape, 16), np.uint8)
        tensors[f"{name}_scales"] = random.integers(120, 125, shape, np.uint8)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": KEPT}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return folder, save_packed(folder)


@pytest.fixture(scope="module")
def loaded(packed):
    """The model and its params."""
    return hub.load(packed[0])


def theirs(folder):
    """transformers' logits; on a CPU it unpacks the experts as it reads them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long), use_cache=False).logits.float().numpy()


def near(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_codes_and_scales_are_the_files(packed, loaded):
    folder, tensors = packed
    model, params = loaded
    for kernel in KERNELS:
        leaf = params["layers"]["mlp"]["experts"][kernel]["kernel"]
        assert leaf.format == "mxfp4" and leaf.dtype == np.float32
        for layer in range(SIZES["num_hidden_layers"]):
            blocks, scales = (tensors[f"model.layers.{layer}.mlp.experts.{kernel}_{p}"] for p in ("blocks", "scales"))
            np.testing.assert_array_equal(np.swapaxes(leaf.codes[layer], 1, 2), blocks.reshape(*blocks.shape[:2], -1))
            np.testing.assert_array_equal(np.swapaxes(leaf.scales[layer], 1, 2), scales)
            expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
            np.testing.assert_array_equal(quant.dequantize(leaf[layer]), expected.numpy())
    near(model(params, TOKENS), theirs(folder))


def test_the_description_is_the_loaded_models_and_counts_its_bytes(packed, loaded):
    folder, _ = packed
    _, params = loaded
    _, described = hub.describe(folder)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert jax.tree.structure(described) == jax.tree.structure(shapes)
    assert jax.tree.leaves(described) == jax.tree.leaves(shapes)
    experts = described["layers"]["mlp"]["experts"]["down_proj"]["kernel"]
    assert 8 * tree.nbytes(experts) == 4.25 * experts.size
    assert tree.nbytes(described) == tree.nbytes(params)


def test_a_description_needs_no_weights(packed, loaded, tmp_path):
    folder, _ = packed
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    _, described = hub.describe(tmp_path)
    assert jax.tree.structure(described) == jax.tree.structure(loaded[1])


def test_saved_again_the_tensors_are_the_same(packed, loaded, tmp_path):
    folder, tensors = packed
    model, params = loaded
    hub.save_model(tmp_path / "out", model, params)
    written = load_file(tmp_path / "out" / FILE)
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "mxfp4", "modules_to_not_convert": KEPT}
    near(theirs(tmp_path / "out"), theirs(folder))


TARGETS = {
    "attention": dict(target_modules="all-linear"),
    "experts": dict(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
}
TARGETS["both"] = TARGETS["experts"] | TARGETS["attention"]


def adapted(params, targets):
    params = lora.init(params, lora.LoraConfig(r=4, lora_alpha=8, **TARGETS[targets]), jax.random.key(0))
    return tree.map_with_path(lambda path, leaf: jnp.asarray(drawn(leaf.shape)) if "lora_b" in path else leaf, params)


def drawn(shape):
    return np.random.default_rng(1).normal(0, 0.2, shape).astype(np.float32)


@pytest.mark.parametrize("targets", [pytest.param(t, marks=[pytest.mark.slow] * (t != "both")) for t in TARGETS])
def test_adapters_are_trained_on_the_packed_experts(targets, loaded):
    """Loss and gradients are those on the unpacked base, and nothing unpacked is kept for the backward pass."""
    model, base = loaded
    params = adapted(base, targets)
    dense = tree.map_with_path(lambda _, leaf: quant.dequantize(leaf) if quant.is_packed(leaf) else leaf, params)

    def gradients(params):
        frozen, trainable = lora.split(params)
        loss = lambda trainable: jnp.sum(model(lora.combine(frozen, trainable), jnp.asarray(TOKENS)) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(trainable)

    (ours, found), (plain, expected) = gradients(params), gradients(dense)
    np.testing.assert_allclose(ours, plain, rtol=1e-4)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * np.abs(other).max())
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


def test_a_merge_that_leaves_the_experts_alone_keeps_their_bits(packed, loaded, tmp_path):
    _, tensors = packed
    model, base = loaded
    params = adapted(base, "attention")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hub.save_model(tmp_path / "out", model, params)
    written = load_file(tmp_path / "out" / FILE)
    assert written.keys() == tensors.keys()
    same = {name for name, value in tensors.items() if np.array_equal(written[name], value)}
    assert {name for name in tensors if "experts" in name} <= same
    assert not any("q_proj.weight" in name for name in same)
    near(theirs(tmp_path / "out"), model(params, TOKENS))


def test_a_merge_into_the_experts_is_wide_and_says_so(loaded, tmp_path):
    model, base = loaded
    params = adapted(base, "experts")
    with pytest.warns(UserWarning, match=r"experts in MXFP4 \(.* KiB\) are written as float32 .*--quant=mxfp4"):
        hub.save_model(tmp_path / "out", model, params)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    near(theirs(tmp_path / "out"), model(params, TOKENS))


def test_a_merge_packs_again_and_says_what_it_kept(packed, tmp_path, capsys, byte_tokenizer):
    folder = tmp_path / "base"
    shutil.copytree(packed[0], folder)
    byte_tokenizer.save_pretrained(folder)
    _, base = hub.load(folder)
    params = adapted(base, "experts")
    hub.save_adapter(tmp_path / "adapter", params, base=str(folder))
    call = ["merge", f"--model={folder}", f"--adapter={tmp_path / 'adapter'}", "--quant=mxfp4"]
    assert main([*call, f"--out={tmp_path / 'out'}"]) == 2
    assert "packing the sum to mxfp4 would leave" in capsys.readouterr().err
    assert main([*call, "--lossy", f"--out={tmp_path / 'out'}"]) == 0
    assert "of the update kept" in capsys.readouterr().out
    written = load_file(tmp_path / "out" / FILE)
    model, merged = hub.load(tmp_path / "out")
    wanted = lora.merge(params)
    for kernel in KERNELS:
        leaf = merged["layers"]["mlp"]["experts"][kernel]["kernel"]
        whole = wanted["layers"]["mlp"]["experts"][kernel]["kernel"]
        again = quant.quantize(whole, "mxfp4")
        np.testing.assert_array_equal(quant.dequantize(leaf), quant.dequantize(again))
    assert {name for name in written if "experts" in name and not name.endswith("bias")} == {
        f"model.layers.{layer}.mlp.experts.{kernel}_{part}"
        for layer in range(3)
        for kernel in KERNELS
        for part in ("blocks", "scales")
    }
    near(theirs(tmp_path / "out"), model(merged, TOKENS))


def test_a_dense_model_is_packed_as_it_is_read(tmp_path):
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES)).save_pretrained(tmp_path / "dense")
    _, dense = hub.load(tmp_path / "dense")
    model, params = hub.load(tmp_path / "dense", quant=quant.QuantConfig(rules=((r".*/experts/.*/kernel", "mxfp4"),)))
    hub.save_quantized(tmp_path / "out", model, params)
    again_model, again = hub.load(tmp_path / "out")
    for kernel in KERNELS:
        leaf, before = (p["layers"]["mlp"]["experts"][kernel]["kernel"] for p in (again, dense))
        np.testing.assert_array_equal(quant.dequantize(leaf), quant.dequantize(quant.quantize(before, "mxfp4")))
    near(theirs(tmp_path / "out"), again_model(again, TOKENS))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == KEPT
    _, every = hub.load(tmp_path / "dense", quant="mxfp4")
    assert every["layers"]["self_attn"]["q_proj"]["kernel"].format == "mxfp4"
    with pytest.raises(UserError, match=r"q_proj/kernel: is packed \(mxfp4\); such a folder has both kernels"):
        hub.save_quantized(tmp_path / "other", model, every)


def test_layers_of_which_some_are_packed_lie_in_stacks_of_their_own(packed, loaded, tmp_path):
    folder, tensors = packed
    model, params = loaded
    mixed = dict(tensors)
    for kernel in KERNELS:
        name = f"model.layers.1.mlp.experts.{kernel}"
        parts = (torch.tensor(mixed.pop(f"{name}_{part}")) for part in ("blocks", "scales"))
        mixed[name] = convert_moe_packed_tensors(*parts, dtype=torch.float32).contiguous().numpy()
    save_file(mixed, tmp_path / FILE, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    other, found = hub.load(tmp_path)
    assert {"layers@0-0", "layers@1-1", "layers@2-2"} <= found.keys()
    near(other(found, TOKENS), np.asarray(model(params, TOKENS)))
    hub.save_model(tmp_path / "out", other, found)
    written = load_file(tmp_path / "out" / FILE)
    assert written.keys() == mixed.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == [*KEPT, "model.layers.1.mlp.experts"]


def broken(folder, tmp_path, change, config=None):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    found = json.loads((folder / "config.json").read_text()) | (config or {})
    (tmp_path / "config.json").write_text(json.dumps(found))


NAME = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}_scales"), rf"{NAME}: has blocks alone, expected blocks and scales"),
        (lambda t: t.update({f"{NAME}_scales": t[f"{NAME}_scales"].astype(np.int8)}), "its scales are I8, expected U8"),
        (
            lambda t: t.update({f"{NAME}_blocks": t[f"{NAME}_blocks"][:, :-1].copy()}),
            r"its blocks are \(5, 63, 3, 16\)",
        ),
        (lambda t: t[f"{NAME}_scales"].__setitem__((0, 0, 0), 255), r"holds 1 of 960 scales by which values are NaN"),
        (lambda t: [t.pop(f"{NAME}_{part}") for part in ("blocks", "scales")], rf"missing {NAME} \(5, 96, 64\)"),
    ],
)
def test_what_is_wrong_is_named(change, message, packed, tmp_path):
    broken(packed[0], tmp_path, change)
    with pytest.raises(UserError, match=message):
        hub.load(tmp_path)


def test_the_rest_can_be_nf4(packed, loaded, tmp_path):
    """Experts keep their bits; the description, with and without weights, says the same."""
    folder, _ = packed
    _, plain = loaded
    model, params = hub.load(folder, quant="nf4")
    for kernel in KERNELS:
        expected, found = (tree["layers"]["mlp"]["experts"][kernel]["kernel"] for tree in (plain, params))
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scales, expected.scales)
    q_proj = params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert q_proj.format == "nf4"
    expected = quant.quantize(plain["layers"]["self_attn"]["q_proj"]["kernel"], "nf4", double_quant=True)
    jax.tree.map(np.testing.assert_array_equal, q_proj, expected)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    for source in (folder, tmp_path):
        _, described = hub.describe(source, quant="nf4")
        assert jax.tree.structure(described) == jax.tree.structure(shapes)
        assert jax.tree.leaves(described) == jax.tree.leaves(shapes)
    dense = tree.map_with_path(lambda _, leaf: quant.dequantize(leaf) if quant.is_packed(leaf) else leaf, params)
    near(model(params, TOKENS), model(dense, TOKENS))
    hub.save_model(tmp_path / "out", model, params)
    near(theirs(tmp_path / "out"), model(params, TOKENS))


def test_experts_in_mxfp4_cannot_be_merge_aware(packed):
    folder, _ = packed
    rules = ((r".*/experts/.*", None), (r".*layers/.*/kernel", "nf4"))
    for config, fits in ((quant.QuantConfig(merge_aware=True), False), (quant.QuantConfig(rules, True, True), True)):
        for read in (hub.load, hub.describe):
            if not fits:
                with pytest.raises(
                    UserError, match=r"leave them out by rules with None:\n  layers/mlp/experts/down_pr"
                ):
                    read(folder, quant=config)
                continue
            _, params = read(folder, quant=config)
            formats = {path: quant.format_of(leaf) for path, leaf in tree.flatten(params).items()}
            assert formats["layers/mlp/experts/down_proj/kernel"] == "mxfp4"
            assert quant.packs_update(tree.flatten(params)["layers/self_attn/q_proj/kernel"])


def test_other_requests_are_refused(packed, tmp_path):
    folder, _ = packed
    broken(folder, tmp_path, lambda t: None, {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(UserError, match=r"already quantised \(awq\); give the original checkpoint"):
        hub.load(tmp_path)
    (tmp_path / FILE).unlink()
    kept = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.1.mlp.experts"]}}
    config = json.loads((folder / "config.json").read_text()) | kept
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="modules_to_not_convert of mxfp4 names experts: give the folder with its weig"):
        hub.describe(tmp_path)
    assert METHODS.keys() == {"bitsandbytes", "mxfp4"}


def test_packed_experts_are_split_over_a_mesh(packed, loaded):
    folder, _ = packed
    mesh = jlora.sharding.make_mesh(jlora.sharding.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    model, params = loaded
    other, split = hub.load(folder, mesh=mesh)
    near(other(split, TOKENS), np.asarray(model(params, TOKENS)))
