"""Adapters of experts as earlier versions of PEFT and transformers left them: the same logits as there."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from jlora import hub
from jlora.errors import UserError

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2, 11]], np.int32)
SIZES = dict(
    vocab_size=101,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_experts_per_tok=2,
    bos_token_id=None,
    eos_token_id=None,
)
EXPERTS, RANK, WIDTH = 3, 4, 48
FILE, PREFIX = "adapter_model.safetensors", "base_model.model."
# Name → (config of transformers, its mixture in version 5, there as modules of experts in version 4)
FAMILIES = {
    "mixtral": (transformers.MixtralConfig, dict(num_local_experts=EXPERTS), "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        dict(num_experts=EXPERTS, head_dim=16, decoder_sparse_step=1),
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
    ),
    "gpt_oss": (transformers.GptOssConfig, dict(num_local_experts=EXPERTS, head_dim=16), "", ()),
}


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long), use_cache=False).logits.numpy()


def peft_logits(base, folder):
    with warnings.catch_warnings():  # of patterns that match no module, but a parameter
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(base, folder).eval())


def make_base(folder, name="mixtral", inner=40):
    torch.manual_seed(0)
    kind, fields, _, _ = FAMILIES[name]
    widths = dict(intermediate_size=inner) | (dict(moe_intermediate_size=inner) if name == "qwen3_moe" else {})
    model = transformers.AutoModelForCausalLM.from_config(kind(hidden_size=WIDTH, **widths, **fields, **SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def write_adapter(folder, tensors, **fields):
    folder.mkdir()
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=[]) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / FILE)


def add_as_before_0_19_1(model, tensors, layer, parameter, prefix):
    """W[e, i, o] += scale · Σ_r A[e, r, i] B[o, r, e], whatever i and o are (`get_delta_weight` in PEFT 0.18)."""
    a, b = (torch.tensor(tensors[f"{prefix}.lora_{factor}.weight"]) for factor in "AB")
    a, b = a.reshape(EXPERTS, RANK, -1), b.reshape(len(b), RANK, EXPERTS)
    weight = getattr(model.model.layers[layer].mlp.experts, parameter)
    with torch.no_grad():
        weight += 2.0 * torch.einsum("ore,eri->eio", b, a)


def old_tensors(model, seed=0):
    """Adapters of both parameters in every layer as PEFT 0.18 shapes them, and the model with them added."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(SIZES["num_hidden_layers"]):
        for parameter, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            prefix = f"{PREFIX}model.layers.{layer}.mlp.experts{inner}"
            _, first, second = getattr(model.model.layers[layer].mlp.experts, parameter).shape
            for factor, shape in (("A", (RANK * EXPERTS, first)), ("B", (second, RANK * EXPERTS))):
                tensors[f"{prefix}.lora_{factor}.weight"] = 0.3 * rng.standard_normal(shape).astype(np.float32)
            add_as_before_0_19_1(model, tensors, layer, parameter, prefix)
    return tensors


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.18.2.dev0@0a1b2c3", None])
@pytest.mark.parametrize("inner", [40, WIDTH // 2], ids=["shapes tell", "one shape for both"])
def test_a_and_b_exchanged(version, inner, tmp_path):
    model = make_base(tmp_path / "base", inner=inner)
    plain = logits(model)
    tensors = old_tensors(model)
    if inner == WIDTH // 2:  # only what has one shape either way
        tensors = {name: value for name, value in tensors.items() if ".base_layer." in name}
        tensors = {name.replace(".base_layer", ""): value for name, value in tensors.items()}
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        for layer in range(2):
            prefix = f"{PREFIX}model.layers.{layer}.mlp.experts"
            add_as_before_0_19_1(model, tensors, layer, "gate_up_proj", prefix)
    targets = PARAMETERS if inner != WIDTH // 2 else PARAMETERS[:1]
    write_adapter(tmp_path / "old", tensors, target_parameters=targets, peft_version=version)
    expected = logits(model)
    assert np.abs(expected - plain).max() > 0.05
    mine, params = hub.load(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if version or inner != WIDTH // 2 else "ignore")
        adapted = hub.load_adapter(params, tmp_path / "old")
    np.testing.assert_allclose(mine(adapted, TOKENS), expected, atol=1e-4 * np.abs(expected).max())
    hub.save_adapter(tmp_path / "new", adapted, base=str(tmp_path / "base"))  # in the present form
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    np.testing.assert_allclose(logits(opened), expected, atol=1e-4 * np.abs(expected).max())


def test_the_same_file_of_a_later_version_is_pefts(tmp_path):
    model = make_base(tmp_path / "base", inner=WIDTH // 2)
    tensors = {n.replace(".base_layer", ""): v for n, v in old_tensors(model).items() if ".base_layer." in n}
    write_adapter(tmp_path / "new", tensors, target_parameters=PARAMETERS[:1], peft_version="0.19.1")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = peft_logits(base, tmp_path / "new")
    mine, params = hub.load(tmp_path / "base")
    found = mine(hub.load_adapter(params, tmp_path / "new"), TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def write_new(model, folder, targets=PARAMETERS):
    """The logits with a random adapter, which PEFT writes."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_parameters=targets, target_modules=[])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return logits(adapted)


def set_version(folder, version):
    config = json.loads((folder / "adapter_config.json").read_text()) | {"peft_version": version}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("swapped", "version", "message", "right"),
    [
        (
            True,
            "0.21.2",
            'is 0.21.2, by which the experts\' A and B are not swapped.*"peft_version": "0.18.0"',
            "0.18.1",
        ),
        (False, "0.18.1", 'is 0.18.1, by which the experts\' A and B are swapped.*"peft_version": "0.21.2"', "0.20.0"),
        (False, None, 'is missing, as in PEFT 0.17, by which.* are swapped.*"peft_version": "0.21.2"', "0.19.1"),
    ],
)
def test_shapes_decide_nothing(swapped, version, message, right, tmp_path):
    """A version that shapes contradict is an error, which says how to give another."""
    model = make_base(tmp_path / "base")
    if swapped:
        write_adapter(tmp_path / "file", old_tensors(model), target_parameters=PARAMETERS)
        expected = logits(model)
    else:
        expected = write_new(model, tmp_path / "file")
    set_version(tmp_path / "file", version)
    mine, params = hub.load(tmp_path / "base")
    with pytest.raises(UserError, match=message):
        hub.load_adapter(params, tmp_path / "file")
    found = mine(hub.load_adapter(params, tmp_path / "file", peft_version=right), TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2", None])
@pytest.mark.parametrize(
    ("inner", "targets"), [(WIDTH // 2, PARAMETERS[:1]), (WIDTH, PARAMETERS[1:]), (40, PARAMETERS)], ids=str
)
def test_experts_of_gpt_oss_were_not_exchanged(inner, targets, version, tmp_path):
    """Their kernels are [E, in, out], the order that early versions of PEFT assumed of all experts."""
    model = make_base(tmp_path / "base", "gpt_oss", inner)
    plain = logits(model)
    expected = write_new(model, tmp_path / "new", targets)
    assert np.abs(expected - plain).max() > 0.05
    set_version(tmp_path / "new", version)
    mine, params = hub.load(tmp_path / "base")
    found = mine(hub.load_adapter(params, tmp_path / "new"), TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("inner", [40, WIDTH // 2])
def test_but_one_version_exchanged_those_of_gpt_oss(inner, tmp_path):
    """W[e, i, o] += scale · Σ_r B[i, r, e] A[e, r, o] in PEFT 0.19.0 (`get_delta_weight`)."""
    model = make_base(tmp_path / "base", "gpt_oss", inner)
    rng, tensors = np.random.default_rng(0), {}
    for layer, decoder in enumerate(model.model.layers):
        prefix, weight = f"{PREFIX}model.layers.{layer}.mlp.experts", decoder.mlp.experts.gate_up_proj
        shapes = dict(A=(RANK * EXPERTS, weight.shape[2]), B=(weight.shape[1], RANK * EXPERTS))
        a, b = (0.3 * rng.standard_normal(shape).astype(np.float32) for shape in shapes.values())
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        a, b = torch.tensor(a).reshape(EXPERTS, RANK, -1), torch.tensor(b).reshape(len(b), RANK, EXPERTS)
        with torch.no_grad():
            weight += 2.0 * torch.einsum("ire,ero->eio", b, a)
    write_adapter(tmp_path / "old", tensors, target_parameters=PARAMETERS[:1], peft_version="0.19.0")
    expected = logits(model)
    mine, params = hub.load(tmp_path / "base")
    found = mine(hub.load_adapter(params, tmp_path / "old"), TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    if inner == 40:
        with pytest.raises(UserError, match=r'"peft_version": "0\.19\.0"'):
            hub.load_adapter(params, tmp_path / "old", peft_version="0.21.2")


def single_tensors(name, inner=40, router=False, seed=0):
    """Adapters of every expert's linears by themselves, as transformers 4 names them."""
    rng, tensors = np.random.default_rng(seed), {}
    _, _, mixture, parts = FAMILIES[name]
    shapes = dict(zip(parts, ((inner, WIDTH), (inner, WIDTH), (WIDTH, inner)), strict=True))
    modules = [(f"experts.{expert}.{part}", shapes[part]) for expert in range(EXPERTS) for part in parts]
    modules += [("gate", (EXPERTS, WIDTH))] if router else []
    for layer in range(SIZES["num_hidden_layers"]):
        for module, (outputs, inputs) in modules:
            prefix = f"{PREFIX}model.layers.{layer}.{mixture}.{module}"
            for factor, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                tensors[f"{prefix}.lora_{factor}.weight"] = 0.3 * rng.standard_normal(shape).astype(np.float32)
    return tensors


@pytest.mark.parametrize("router", [False, True], ids=["experts", "router too"])
@pytest.mark.parametrize("inner", [40, WIDTH // 2])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_one_by_one(name, inner, router, tmp_path):
    make_base(tmp_path / "base", name, inner)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    plain = logits(base)
    targets = [*FAMILIES[name][3], *(["gate"] if router else [])]
    tensors = single_tensors(name, inner, router)
    write_adapter(tmp_path / "one", tensors, target_modules=targets, peft_version="0.17.1")
    expected = peft_logits(base, tmp_path / "one")
    assert np.abs(expected - plain).max() > 0.05
    mine, params = hub.load(tmp_path / "base")
    found = mine(hub.load_adapter(params, tmp_path / "one"), TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_one_by_one_strictly(tmp_path):
    make_base(tmp_path / "base")
    tensors = single_tensors("mixtral")
    lost = f"{PREFIX}model.layers.1.block_sparse_moe.experts.2.w3.lora_B.weight"
    short = f"{PREFIX}model.layers.0.block_sparse_moe.experts.0.w2.lora_A.weight"
    del tensors[lost]
    tensors[short] = tensors[short][:, :-1]
    write_adapter(tmp_path / "one", tensors, target_modules=["w1", "w2", "w3"])
    with pytest.raises(UserError) as caught:
        hub.load_adapter(hub.load(tmp_path / "base")[1], tmp_path / "one")
    assert f"missing {lost} (40, 4)" in str(caught.value)
    assert f"{short} has shape (4, 39), expected (4, 40)" in str(caught.value)


def test_only_gates_one_by_one(tmp_path):
    """PEFT 0.21 does not open these; the parts of a stacked parameter that are not adapted stay as they are."""
    model = make_base(tmp_path / "base")
    tensors = {name: value for name, value in single_tensors("mixtral").items() if ".w1." in name}
    write_adapter(tmp_path / "one", tensors, target_modules=["w1"])
    with torch.no_grad():
        for layer in range(2):
            for expert in range(EXPERTS):
                prefix = f"{PREFIX}model.layers.{layer}.block_sparse_moe.experts.{expert}.w1"
                a, b = (torch.tensor(tensors[f"{prefix}.lora_{factor}.weight"]) for factor in "AB")
                model.model.layers[layer].mlp.experts.gate_up_proj[expert, :40] += 2.0 * b @ a
    mine, params = hub.load(tmp_path / "base")
    expected = logits(model)
    found = mine(hub.load_adapter(params, tmp_path / "one"), TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_present_form_stays_as_it_is(tmp_path):
    expected = write_new(make_base(tmp_path / "base"), tmp_path / "new")
    mine, params = hub.load(tmp_path / "base")
    found = mine(hub.load_adapter(params, tmp_path / "new"), TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


GRANITE = transformers.GraniteMoeConfig, dict(intermediate_size=40, num_local_experts=EXPERTS)
HYBRID = (
    transformers.GraniteMoeHybridConfig,
    dict(intermediate_size=40, num_local_experts=EXPERTS, shared_intermediate_size=20, layer_types=["attention"] * 2)
    | dict(mamba_n_heads=4),
)
GEMMA = (
    transformers.Gemma4TextConfig,
    dict(intermediate_size=40, head_dim=16, global_head_dim=12, hidden_size_per_layer_input=0, pad_token_id=0)
    | dict(enable_moe_block=True, num_experts=EXPERTS, top_k_experts=2, moe_intermediate_size=20),
)
NEMOTRON = (
    transformers.NemotronHConfig,
    dict(layers_block_type=["attention", "moe"], n_routed_experts=EXPERTS, moe_intermediate_size=40, head_dim=16)
    | dict(moe_shared_expert_intermediate_size=20, moe_latent_size=20, intermediate_size=20),
)
KERNELS = ("experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        pytest.param(GRANITE, [f"block_sparse_moe.{name}" for name in (*KERNELS, "router.weight")], id="granitemoe"),
        pytest.param(HYBRID, [f"block_sparse_moe.{name}" for name in KERNELS], id="granitemoehybrid"),
        pytest.param(GEMMA, [*KERNELS], id="gemma4_text"),
        pytest.param(
            NEMOTRON, [f"mixer.{name}" for name in ("experts.up_proj", KERNELS[1], "gate.weight")], id="nemotron_h"
        ),
    ],
)
def test_experts_that_a_file_has_in_one_tensor(family, parameters, tmp_path):
    """Adapters of all that PEFT takes by `target_parameters`, in and out."""
    torch.manual_seed(0)
    kind, fields = family
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | dict(hidden_size=WIDTH) | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=RANK, target_modules=["q_proj"], target_parameters=parameters)
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "theirs")
    mine, params = hub.load(tmp_path / "base")
    params = hub.load_adapter(params, tmp_path / "theirs")
    np.testing.assert_allclose(mine(params, TOKENS), expected, atol=1e-4 * np.abs(expected).max())
    hub.save_adapter(tmp_path / "ours", params, base=str(tmp_path / "base"))
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(logits(opened), expected, atol=1e-4 * np.abs(expected).max())
