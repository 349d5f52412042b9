"""Adapters of experts one by one, as vLLM and SGLang read them: in PEFT where it opens them, and back to the bit."""

import json
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jlora import hub, lora, tree
from jlora.cli.main import main
from jlora.errors import UserError
from jlora.lora import LoraConfig

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2, 11]], np.int32)
EXPERTS, RANK, WIDTH, INNER = 3, 4, 48, 40
SIZES = dict(
    vocab_size=101,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_experts_per_tok=2,
    bos_token_id=None,
    eos_token_id=None,
)
QWEN = dict(num_experts=EXPERTS, moe_intermediate_size=INNER, head_dim=16, decoder_sparse_step=1)
GEMMA = dict(head_dim=16, global_head_dim=12, hidden_size_per_layer_input=0, pad_token_id=0, enable_moe_block=True)
# Name → (config of transformers, what it has beside SIZES, the first expert's gate and the router in the file)
FAMILIES = {
    "mixtral": (
        transformers.MixtralConfig,
        dict(num_local_experts=EXPERTS),
        "block_sparse_moe.experts.0.w1",
        "block_sparse_moe.gate",
    ),
    "qwen3_moe": (transformers.Qwen3MoeConfig, QWEN, "mlp.experts.0.gate_proj", "mlp.gate"),
    "a dense layer": (transformers.Qwen3MoeConfig, QWEN | dict(mlp_only_layers=[0]), "mlp.experts.0.gate_proj", None),
    "gpt_oss": (
        transformers.GptOssConfig,
        dict(num_local_experts=EXPERTS, head_dim=16),
        "mlp.experts.0.w1",
        "mlp.router",
    ),
    "granitemoe": (
        transformers.GraniteMoeConfig,
        dict(num_local_experts=EXPERTS),
        "block_sparse_moe.experts.0.w1",
        "block_sparse_moe.gate",
    ),
    "lfm2_moe": (
        transformers.Lfm2MoeConfig,
        dict(num_experts=EXPERTS, moe_intermediate_size=INNER, num_dense_layers=0, layer_types=["full_attention"] * 2),
        "feed_forward.experts.0.w1",
        "feed_forward.gate",
    ),
    "nemotron_h": (
        transformers.NemotronHConfig,
        dict(layers_block_type=["attention", "moe"], n_routed_experts=EXPERTS, moe_intermediate_size=INNER)
        | dict(head_dim=16, moe_shared_expert_intermediate_size=20),
        "mixer.experts.0.up_proj",
        "mixer.gate",
    ),
    "gemma4_text": (
        transformers.Gemma4TextConfig,
        GEMMA | dict(num_experts=EXPERTS, top_k_experts=2, moe_intermediate_size=20),
        "moe.experts.0.gate_proj",
        None,
    ),
}


def make_base(folder, name):
    torch.manual_seed(0)
    kind, fields, *_ = FAMILIES[name]
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def adapted(base, name, **fields):
    """(model, params with a random adapter of the experts, the router and q_proj, with ranks of their own)"""
    model, params = hub.load(base)
    router = FAMILIES[name][3] and f"{model.config.names.router}.weight"
    first = "gate_up_proj" if model.config.gated else "up_proj"
    targets = [f"experts.{first}", "experts.down_proj", *([router] if router else [])]
    config = LoraConfig(
        **dict(r=RANK, lora_alpha=6, rank_pattern={"q_proj": 3}, target_parameters=targets, target_modules=["q_proj"])
        | fields
    )
    params = lora.init(params, config, jax.random.key(0))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        return 0.3 * rng.standard_normal(leaf.shape).astype(np.float32) if path.endswith("/lora_b") else leaf

    return model, tree.map_with_path(fill, params)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long), use_cache=False).logits.numpy()


def same(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert jax.tree.all(jax.tree.map(np.array_equal, found[path], leaf)), path


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name, tmp_path):
    make_base(tmp_path / "base", name)
    _, params = adapted(tmp_path / "base", name)
    hub.save_adapter(tmp_path / "each", params, base=str(tmp_path / "base"), experts="each")
    tensors = load_file(tmp_path / "each" / "adapter_model.safetensors")
    _, _, first, router = FAMILIES[name]
    a = tensors[f"base_model.model.model.layers.1.{first}.lora_A.weight"]
    assert a.shape == (RANK, WIDTH)
    up = first.replace("gate", "up").replace("w1", "w3")
    np.testing.assert_array_equal(a, tensors[f"base_model.model.model.layers.1.{up}.lora_A.weight"])
    assert router is None or f"base_model.model.model.layers.1.{router}.lora_B.weight" in tensors
    config = json.loads((tmp_path / "each" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    assert len(config["target_modules"]) <= 3 * EXPERTS + 2
    base = hub.load(tmp_path / "base")[1]
    same(hub.load_adapter(base, tmp_path / "each"), params)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_in_peft(name, tmp_path, parity):
    """It puts them together for the model in memory, as it does with those of transformers 4."""
    base = make_base(tmp_path / "base", name)
    model, params = adapted(tmp_path / "base", name)
    hub.save_adapter(tmp_path / "each", params, base=str(tmp_path / "base"), experts="each", fold=True)
    assert hub.scales_note(tmp_path / "each") is None
    plain = logits(base)
    with warnings.catch_warnings():  # of patterns that match no module, but a parameter
        warnings.simplefilter("ignore")
        opened = peft.PeftModel.from_pretrained(base, tmp_path / "each").eval()
    expected = logits(opened)
    assert np.abs(expected - plain).max() > 0.05
    found = np.abs(model(params, TOKENS) - expected).max() / np.abs(expected).max()
    parity("format", "PEFT adapter, experts one by one", "out", found)
    assert found < 1e-4


def test_gates_of_gpt_oss_alternate_with_ups(tmp_path):
    """w1's and w3's updates are those of the even and odd columns, and the file is no larger for a rank of its own."""
    base = make_base(tmp_path / "base", "gpt_oss")
    model, params = adapted(tmp_path / "base", "gpt_oss", target_modules=[], target_parameters=["experts.gate_up_proj"])
    hub.save_adapter(tmp_path / "each", params, base=str(tmp_path / "base"), experts="each")
    tensors = load_file(tmp_path / "each" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == {"w1", "w3"}
    for layer, decoder in enumerate(base.model.layers):
        for expert in range(EXPERTS):
            for column, part in enumerate(("w1", "w3")):
                prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{part}"
                a, b = (tensors[f"{prefix}.lora_{factor}.weight"] for factor in "AB")
                with torch.no_grad():
                    decoder.mlp.experts.gate_up_proj[expert, :, column::2] += 6 / RANK * torch.tensor((b @ a).T)
    expected = logits(base)
    assert np.abs(expected - np.asarray(model(lora.strip(params), TOKENS))).max() > 0.05
    np.testing.assert_allclose(model(params, TOKENS), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (None, dict(experts="each"), "base must be the folder or Hub id of the base model; found none"),
        ("base", dict(experts="apart"), "experts='apart': expected one of stacked, each"),
    ],
)
def test_what_cannot_be_written(base, fields, message, tmp_path):
    make_base(tmp_path / "base", "mixtral")
    _, params = adapted(tmp_path / "base", "mixtral")
    with pytest.raises(UserError, match=message):
        hub.save_adapter(tmp_path / "each", params, base=base and str(tmp_path / base), **fields)
    assert not (tmp_path / "each").exists()


def test_from_the_command_line(tmp_path, capsys):
    make_base(tmp_path / "base", "qwen3_moe")
    _, params = adapted(tmp_path / "base", "qwen3_moe")
    hub.save_adapter(tmp_path / "stacked", params, base=str(tmp_path / "base"))
    common = ["merge", f"--model={tmp_path / 'base'}", f"--adapter={tmp_path / 'stacked'}", "--experts=each"]
    assert main([*common, "--adapter_only", f"--out={tmp_path / 'each'}"]) == 0
    assert "base: experts 60.5% in float32 (135.0 KiB), others" in capsys.readouterr().err
    same(hub.load_adapter(hub.load(tmp_path / "base")[1], tmp_path / "each"), params)
    names = load_file(tmp_path / "each" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.experts.2.down_proj.lora_A.weight" in names
    assert main([*common, f"--out={tmp_path / 'merged'}"]) == 2
    assert "--experts is for the PEFT adapter that --adapter_only writes" in capsys.readouterr().err
