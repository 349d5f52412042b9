"""PEFT's (IA)³, LoHa, LoKr and VeRA as LoRA: of full rank what PEFT computes, below it PEFT's own conversion."""

import json
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.numpy import load_file, save_file

import jlora
from jlora import hub, lora, quant, tree

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2, 11]], np.int32)
BIASES = dict(attention_bias=True, mlp_bias=True)
LINEAR = ["q_proj", "k_proj", "down_proj"]
# (PEFT's config class, its fields, fields of the model, whether PEFT converts it)
CASES = {
    "loha": (peft.LoHaConfig, dict(r=3, alpha=5, target_modules=LINEAR), {}, True),
    "loha, r² beyond the sizes": (peft.LoHaConfig, dict(r=8, alpha=5, target_modules=LINEAR), {}, True),
    "loha, ranks": (
        peft.LoHaConfig,
        dict(
            r=3, alpha=5, target_modules="all-linear", rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*k_proj": 7}
        ),
        {},
        True,
    ),
    "loha, some layers": (peft.LoHaConfig, dict(r=2, target_modules=["up_proj"], layers_to_transform=[0, 2]), {}, True),
    "loha, modules_to_save": (peft.LoHaConfig, dict(r=2, target_modules=LINEAR, modules_to_save=["norm"]), {}, True),
    "lokr": (peft.LoKrConfig, dict(r=2, alpha=3, target_modules=LINEAR), {}, True),
    "lokr, both": (peft.LoKrConfig, dict(r=2, target_modules="all-linear", decompose_both=True), {}, True),
    "lokr, whole": (peft.LoKrConfig, dict(r=32, target_modules=LINEAR), {}, True),
    "lokr, factor": (peft.LoKrConfig, dict(r=3, target_modules="all-linear", decompose_factor=12), {}, True),
    "lokr, factor that does not divide": (
        peft.LoKrConfig,
        dict(r=3, target_modules=LINEAR, decompose_both=True, decompose_factor=7),
        {},
        True,
    ),
    "ia3": (peft.IA3Config, dict(target_modules=LINEAR, feedforward_modules=["down_proj"]), {}, False),
    "ia3, biases": (peft.IA3Config, dict(target_modules=LINEAR, feedforward_modules=["down_proj"]), BIASES, False),
    "ia3, all inputs": (peft.IA3Config, dict(target_modules=LINEAR, feedforward_modules=LINEAR), BIASES, False),
    "ia3, patterns": (
        peft.IA3Config,
        dict(target_modules=".*layers.[02].*(q_proj|up_proj)", feedforward_modules=r".*\.up_proj"),
        BIASES,
        False,
    ),
    "ia3, tied head": (
        peft.IA3Config,
        dict(target_modules=["lm_head", "v_proj"], feedforward_modules=[]),
        dict(tie_word_embeddings=True),
        False,
    ),
    "vera": (peft.VeraConfig, dict(r=6, target_modules=LINEAR), {}, True),
    "vera, projections left out": (
        peft.VeraConfig,
        dict(r=6, target_modules="all-linear", save_projection=False, projection_prng_key=123),
        {},
        True,
    ),
}

NAMES = {"loha": "LoHa", "lokr": "LoKr", "ia3": "(IA)³", "vera": "VeRA"}


@pytest.fixture
def quiet():
    """PEFT warns of tied weights and of projections that it does not save."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_peft(model, kind, settings):
    """A PeftModel whose every trained parameter is random."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.4 * torch.randn_like(parameter) + (1 if kind is peft.IA3Config else 0))
    return adapted


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long), use_cache=False).logits.numpy()


def make_case(name, llama_folder, tmp_path):
    """(transformers model with the adapter, its file's folder, jlora model and base params)"""
    kind, settings, fields, _ = CASES[name]
    folder, reference = llama_folder(**fields)
    plain = torch_logits(reference)
    adapted = make_peft(reference, kind, settings)
    adapted.save_pretrained(tmp_path / "peft")
    assert np.abs(torch_logits(adapted) - plain).max() > 0.05
    return adapted, tmp_path / "peft", *hub.load(folder)


@pytest.fixture(params=CASES)
def case(request, llama_folder, tmp_path, quiet):
    return make_case(request.param, llama_folder, tmp_path)


def deltas(params, base):
    """Hub name → A @ B of every adapted layer, [N, D] as torch has it."""
    found = {}
    for path, merged in tree.flatten(lora.merge(params)).items():
        module, _, leaf = path.rpartition("/")
        if leaf != "kernel" or module.endswith("lm_head"):
            continue
        change = np.asarray(merged) - np.asarray(tree.flatten(base)[path])
        for i, value in enumerate(change):
            found[f"model.{module}".replace("layers/", f"layers.{i}.", 1).replace("/", ".")] = value.T
    return found


def peft_deltas(adapted):
    """Hub name → PEFT's change of the weight."""
    before = {name: value.clone() for name, value in adapted.state_dict().items() if "base_layer.weight" in name}
    adapted.merge_adapter()
    after = adapted.state_dict()
    found = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer.weight"): (after[name] - value).numpy()
        for name, value in before.items()
    }
    adapted.unmerge_adapter()
    return found


def test_full_rank_gives_pefts_logits(case, parity, request):
    adapted, file, model, params = case
    expected = torch_logits(adapted)
    converted, report = jlora.convert_adapter(params, file, 101)
    found = np.abs(model(converted, TOKENS) - expected).max() / np.abs(expected).max()
    kind = request.node.callspec.params["case"].partition(", ")[0]
    parity("format", f"{NAMES[kind]} as LoRA", "in", found)
    assert found < 1e-4
    assert report.energy_kept == 1 and all(module.error == 0 for module in report.modules)


def test_written_as_lora_it_opens_in_peft(case, tmp_path):
    adapted, file, _, params = case
    converted, _ = hub.convert_adapter(params, file, 101)
    hub.save_adapter(tmp_path / "lora", converted, base=str(tmp_path / "base"))
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    expected = torch_logits(adapted)
    np.testing.assert_allclose(torch_logits(opened), expected, atol=1e-4 * np.abs(expected).max())
    again = tree.flatten(hub.load_adapter(params, tmp_path / "lora"))
    for path, leaf in tree.flatten(converted).items():
        np.testing.assert_allclose(again[path], leaf, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", [name for name, (*_, converts) in CASES.items() if converts and "save" not in name])
def test_lower_ranks_are_pefts_conversion(name, llama_folder, tmp_path, quiet):
    adapted, file, _, params = make_case(name, llama_folder, tmp_path)
    for rank in (2, 0.7, 0.99):
        _, tensors = convert_to_lora(adapted, rank)
        converted, report = hub.convert_adapter(params, file, rank)
        found = deltas(converted, params)
        assert len(report.modules) == len(tensors) // 2
        for module in report.modules:
            a, b = (tensors[f"base_model.model.{module.name}.lora_{side}.weight"].numpy() for side in "AB")
            assert module.rank == len(a)
            expected = b @ a
            atol = 1e-4 * np.abs(expected).max()
            np.testing.assert_allclose(found[module.name], expected, atol=atol, err_msg=f"{module.name}, {rank}")


@pytest.mark.parametrize("name", ["loha", "lokr, whole", "ia3, biases", "vera"])
def test_the_report_is_what_numpy_finds(name, llama_folder, tmp_path, quiet):
    adapted, file, _, params = make_case(name, llama_folder, tmp_path)
    converted, report = hub.convert_adapter(params, file, 2)
    found, wanted = deltas(converted, params), peft_deltas(adapted)
    lost = total = 0.0
    for module in report.modules:
        left, full = (np.linalg.norm(x) for x in (wanted[module.name] - found[module.name], wanted[module.name]))
        assert module.rank == 2
        assert module.error == pytest.approx(left / full, rel=1e-3)
        lost, total = lost + left**2, total + full**2
    assert 0.1 < report.energy_kept == pytest.approx(1 - lost / total, rel=1e-4)
    lines = str(report).splitlines()
    assert lines[0].endswith("of the energy kept") and len(lines) == 2 + len(report.modules)
    assert lines[2].split() == [report.modules[0].name, "2", f"{report.modules[0].error:.2e}"]


def test_ia3_of_a_packed_base_is_that_of_its_unpacked_values(llama_folder, tmp_path, quiet):
    folder, _ = llama_folder()
    model, params = hub.load(folder, quant="nf4")
    dense = tree.map_with_path(lambda _, x: quant.dequantize(x) if quant.is_packed(x) else x, params)
    hub.save_model(tmp_path / "dense", model, dense)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    adapted = make_peft(reference, *CASES["ia3"][:2])
    adapted.save_pretrained(tmp_path / "peft")
    expected = torch_logits(adapted)
    converted, _ = hub.convert_adapter(params, tmp_path / "peft", 80)
    np.testing.assert_allclose(model(converted, TOKENS), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kind, settings", [(peft.IA3Config, dict(feedforward_modules=["mlp.c_proj"])), (peft.VeraConfig, dict(r=4))]
)
def test_gpt2(kind, settings, tmp_path, quiet):
    """Whose weights PEFT finds lying the other way round, and whose linears have biases."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=101, n_embd=48, n_layer=2, n_head=3, n_positions=64, bos_token_id=1, eos_token_id=2)
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "base")
    adapted = make_peft(reference, kind, settings | dict(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path / "peft")
    expected = torch_logits(adapted)
    model, params = hub.load(tmp_path / "base")
    converted, _ = hub.convert_adapter(params, tmp_path / "peft", 200)
    np.testing.assert_allclose(model(converted, TOKENS), expected, atol=1e-4 * np.abs(expected).max())


def test_layers_left_out_have_rank_0(llama_folder, tmp_path, quiet):
    _, file, _, params = make_case("loha, some layers", llama_folder, tmp_path)
    converted, report = hub.convert_adapter(params, file, 3)
    module = converted["layers"]["mlp"]["up_proj"]
    assert module["lora_rank"].tolist() == [3, 0, 3] and module["lora_scale"].tolist() == [1, 0, 1]
    assert module["lora_a"].shape == (3, 48, 3) and module["lora_b"].shape == (3, 3, 80)
    assert not np.any(module["lora_a"][1]) and np.any(module["lora_a"][2])
    assert [module.name for module in report.modules] == [f"model.layers.{i}.mlp.up_proj" for i in (0, 2)]


def test_no_more_rank_than_there_is(llama_folder, tmp_path, quiet):
    _, file, _, params = make_case("vera", llama_folder, tmp_path)
    converted, report = hub.convert_adapter(params, file, 40)
    assert {module.rank for module in report.modules} == {6}
    a = np.asarray(converted["layers"]["self_attn"]["q_proj"]["lora_a"])
    np.testing.assert_allclose(a.swapaxes(1, 2) @ a, np.stack([np.eye(6)] * 3), atol=1e-5)


def test_what_was_there_before_is_replaced(llama_folder, tmp_path, quiet):
    _, file, _, params = make_case("loha", llama_folder, tmp_path)
    before = lora.init(params, lora.LoraConfig(target_modules=("up_proj",)), jax.random.key(0))
    after, _ = hub.convert_adapter(before, file, 2)
    assert jax.tree.structure(after) == jax.tree.structure(hub.convert_adapter(params, file, 2)[0])


# name → (case, what happens to the tensors, what the message must say)
BROKEN = {
    "missing": ("loha", lambda t, n: t.pop(n), "missing"),
    "misshapen": ("loha", lambda t, n: t.update({n: t[n][:-1]}), "has shape"),
    "a convolution's": ("lokr", lambda t, n: t.update({n.rpartition(".")[0] + ".lokr_t2": t[n]}), "unknown"),
    "of another linear": ("ia3", lambda t, n: t.update({n.replace("layers.0", "layers.7"): t[n]}), "no such linear"),
    "not targeted": ("ia3", lambda t, n: t.update({n.replace("down_proj", "up_proj"): t[n]}), "does not target"),
    "no projection": ("vera", lambda t, n: t.pop("base_model.vera_B"), "missing base_model.vera_B"),
    "small projection": ("vera", lambda t, n: t.update({"base_model.vera_A": t["base_model.vera_A"][:, :9]}), "vera_A"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_do_not_fit_are_listed(name, llama_folder, tmp_path, quiet):
    kind, damage, message = BROKEN[name]
    _, file, _, params = make_case(kind, llama_folder, tmp_path)
    tensors = load_file(file / "adapter_model.safetensors")
    damage(tensors, sorted(name for name in tensors if "layers.0" in name)[0])
    save_file(tensors, file / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"nothing was loaded(.|\n)*{message}"):
        hub.convert_adapter(params, file, 2)


# (case, changes of the config, what the message must say)
FIELDS = [
    ("loha", dict(peft_type="LORA"), "load_adapter"),
    ("loha", dict(peft_type="OFT"), "'OFT'"),
    ("loha", dict(r=0, alpha="x", rank_pattern=[]), "r is 0(.|\n)*alpha is 'x'"),
    ("lokr", dict(decompose_factor="x"), "decompose_factor"),
    ("vera", dict(bias="vera_only"), "bias='vera_only'"),
    ("ia3", dict(feedforward_modules=None), "feedforward_modules is missing"),
]


@pytest.mark.parametrize("kind, changes, message", FIELDS)
def test_fields_that_cannot_be_are_errors(kind, changes, message, llama_folder, tmp_path, quiet, edit_json):
    _, file, _, params = make_case(kind, llama_folder, tmp_path)
    edit_json(file / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        hub.convert_adapter(params, file, 2)


def test_a_field_of_a_newer_peft_is_named(llama_folder, tmp_path, quiet, edit_json):
    _, file, _, params = make_case("loha", llama_folder, tmp_path)
    edit_json(file / "adapter_config.json", use_magic=True)
    with pytest.warns(UserWarning, match="use_magic"):
        hub.convert_adapter(params, file, 2)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True])
def test_ranks_that_cannot_be(rank, tmp_path):
    with pytest.raises(ValueError, match="expected a positive integer, or a float"):
        hub.convert_adapter({}, tmp_path, rank)


def test_without_target_modules_the_file_decides(llama_folder, tmp_path, quiet):
    _, file, _, params = make_case("loha", llama_folder, tmp_path)
    expected, _ = hub.convert_adapter(params, file, 2)
    config = json.loads((file / "adapter_config.json").read_text())
    (file / "adapter_config.json").write_text(json.dumps(config | {"target_modules": None}))
    found, _ = hub.convert_adapter(params, file, 2)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
