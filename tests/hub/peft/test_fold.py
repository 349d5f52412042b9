"""Adapters for readers that take one rank and one scale for every module, as vLLM and others do."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import hub, lora, tree
from jlora.lora import LoraConfig

CASES = {
    "rank by module": dict(r=4, lora_alpha=8, rank_pattern={"v_proj": 2, "layers.1.mlp.up_proj": 7}),
    "alpha by module": dict(r=4, lora_alpha=8, alpha_pattern={"q_proj": 1}),
    "rank and alpha": dict(r=3, lora_alpha=5, rank_pattern={"up_proj": 6}, alpha_pattern={"up_proj": 3, "k_proj": 9}),
    "rsLoRA": dict(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"v_proj": 9}),
    "dora": dict(r=4, lora_alpha=8, use_dora=True, rank_pattern={"v_proj": 2}),
    "bias": dict(r=4, lora_alpha=8, lora_bias=True, alpha_pattern={"v_proj": 2}),
    "tied": dict(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"], rank_pattern={"embed_tokens": 2}),
}


def trained(params, **settings):
    """The params with an adapter that has learned something, in factors and biases."""
    params = lora.init(params, LoraConfig(init_lora_weights=False, **settings), jax.random.key(0))
    return tree.map_with_path(lambda path, leaf: leaf + 0.1 if path.endswith("lora_bias") else leaf, params)


@pytest.fixture
def base(llama_folder):
    """(model, params) of a Llama whose head is its embedding, with biases."""
    return hub.load(llama_folder(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)[0], dtype="float32")


def read_as_vllm(folder):
    """{module: its update [out, in]}, by the tensors' names and one scale, lora_alpha / r, for all."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    updates = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            assert a.shape[0] == b.shape[1] == config["r"], name
            updates[name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")] = scale * b @ a
    return updates


def same_values(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_and_one_scale_hold_for_every_module(base, tmp_path, case):
    _, params = base
    adapted = trained(params, **CASES[case])
    hub.save_adapter(tmp_path / "own", adapted)
    hub.save_adapter(tmp_path / "folded", adapted, fold=True)
    config = json.loads((tmp_path / "folded" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["rank_pattern"] == config["alpha_pattern"] == {}
    sums = tree.flatten(lora.merge(adapted))
    for name in ("own", "folded"):
        same_values(tree.flatten(lora.merge(hub.load_adapter(params, tmp_path / name))), sums)
    if case not in ("dora", "bias", "tied"):  # which vLLM refuses, or keeps elsewhere
        plain = tree.flatten(params)
        for name, update in read_as_vllm(tmp_path / "folded").items():
            _, _, layer, group, module = name.split(".")
            path = f"layers/{group}/{module}/kernel"
            change = np.asarray(sums[path][int(layer)] - plain[path][int(layer)]).T
            np.testing.assert_allclose(update, change, atol=1e-5, err_msg=name)


def test_experts_are_folded_too(tmp_path):
    import transformers

    sizes = dict(vocab_size=101, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    _, params = hub.load(tmp_path / "base", dtype="float32")
    named = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
    adapted = trained(params, r=4, lora_alpha=8, rank_pattern={"down_proj": 2, "q_proj": 3}, **named)
    hub.save_adapter(tmp_path / "folded", adapted, fold=True)
    written = json.loads((tmp_path / "folded" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (4, 4, {})
    found = hub.load_adapter(params, tmp_path / "folded")
    same_values(tree.flatten(lora.merge(found)), tree.flatten(lora.merge(adapted)))


def test_what_other_readers_would_take_otherwise_is_said(base, tmp_path):
    _, params = base
    own = trained(params, **CASES["rank by module"])
    notes = []
    for adapted, fold in ((own, False), (own, True), (trained(params, r=4), False)):
        hub.save_adapter(tmp_path / "out", adapted, fold=fold)
        notes.append(hub.scales_note(tmp_path / "out"))
        assert ("differ by module" in (tmp_path / "out" / "README.md").read_text()) == (notes[-1] is not None)
    assert notes[1:] == [None, None]
    assert notes[0].startswith("4 modules with a scale of its own (model.layers.0.self_attn.v_proj, ")


def test_weights_that_are_no_numbers_are_not_written(base, tmp_path):
    model, params = base
    adapted = trained(params, r=4)
    spoilt = tree.map_with_path(
        lambda path, leaf: leaf.at[..., 0, 0].set(np.nan) if "q_proj/lora_b" in path else leaf, adapted
    )
    out = tmp_path / "out"
    hub.save_adapter(out, adapted)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.lora_B\.weight holds 1 of"):
        hub.save_adapter(out, spoilt)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    for save, name in ((hub.save_model, "model"), (hub.save_gguf, "model.gguf")):
        with pytest.raises(ValueError, match=r"q_proj|attn_q"):
            save(tmp_path / name, model, spoilt)
    with pytest.raises(ValueError, match=r"q_proj|attn_q"):
        hub.save_gguf_adapter(tmp_path / "lora.gguf", model, spoilt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
