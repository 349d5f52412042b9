"""Everything that PEFT's LoRA can train beside A and B, in both directions: the same logits, the same tensors."""

import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jlora import hub, lora, quant, tree

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2, 11]], np.int32)
BIASES = dict(attention_bias=True, mlp_bias=True)
TIED = dict(tie_word_embeddings=True)
# (fields of the model, fields of the adapter)
FEATURES = {
    "dora": ({}, dict(target_modules="all-linear", use_dora=True)),
    "dora, biases": (BIASES, dict(target_modules=["q_proj", "down_proj"], use_dora=True, use_rslora=True)),
    "dora, some layers": ({}, dict(target_modules=["up_proj"], use_dora=True, layers_to_transform=[0, 2])),
    "dora, ranks": ({}, dict(target_modules=["q_proj", "v_proj"], use_dora=True, rank_pattern={"layers.1.*q_proj": 2})),
    "dora, head": ({}, dict(target_modules=["lm_head"], use_dora=True)),
    "embedding and head": ({}, dict(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "tied embedding": (TIED, dict(target_modules=["embed_tokens", "q_proj"])),
    "tied embedding and head": (TIED, dict(target_modules=["embed_tokens", "lm_head"])),
    "tied, one adapter": (TIED, dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
    "tied head": (TIED, dict(target_modules=["lm_head", "q_proj"])),
    "modules_to_save": ({}, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"])),
    "modules_to_save, in layers": (
        BIASES,
        dict(target_modules=["q_proj"], modules_to_save=["up_proj", "input_layernorm"]),
    ),
    "modules_to_save, tied": (TIED, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "modules_to_save, tied head": (TIED, dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "modules_to_save, one": (
        TIED,
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "bias all": (BIASES, dict(target_modules=["q_proj", "up_proj"], bias="all")),
    "bias lora_only": (BIASES, dict(target_modules=["q_proj", "up_proj"], bias="lora_only")),
    "lora_bias": (BIASES, dict(target_modules=["q_proj", "up_proj"], lora_bias=True, lora_alpha=12)),
    "tokens": ({}, dict(target_modules=["q_proj"], trainable_token_indices=[3, 7, 100])),
    "tokens, tied": (TIED, dict(target_modules=["q_proj"], trainable_token_indices=[3, 7])),
    "tokens of both": (
        {},
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [1, 2, 5]}),
    ),
}


def make_peft(model, settings):
    """A PeftModel whose every trained parameter is random."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn_like(parameter)
                parameter.copy_(noise if ".lora_A" in name or ".lora_B" in name else parameter + noise)
        if settings.get("ensure_weight_tying"):
            tie(adapted)
    return adapted


def tie(adapted):
    """What is one adapter may be two parameters in PEFT: make them equal again."""
    parameters = dict(adapted.named_parameters())
    for name, value in parameters.items():
        if "embed_tokens.lora_embedding_" in name:
            other = "lora_B.default.weight" if "lora_embedding_A" in name else "lora_A.default.weight"
            parameters[f"base_model.model.lm_head.{other}"].copy_(value.T)
        if name.endswith("embed_tokens.modules_to_save.default.weight"):
            head = adapted.base_model.model.lm_head
            getattr(head, "modules_to_save", {"default": head})["default"].weight.copy_(value)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long), use_cache=False).logits.numpy()


@pytest.fixture
def feature(request):
    return request.node.callspec.params["case"].partition(",")[0]


@pytest.fixture
def quiet():
    """PEFT warns of tied weights, and that it stores a copy of an adapted embedding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(params=FEATURES)
def case(request, llama_folder, tmp_path, quiet):
    """(folder of the base, transformers model with the adapter, its file's folder, jlora model and base params)"""
    fields, settings = FEATURES[request.param]
    folder, reference = llama_folder(**fields)
    plain = torch_logits(reference)
    adapted = make_peft(reference, settings)
    adapted.save_pretrained(tmp_path / "peft")
    assert np.abs(torch_logits(adapted) - plain).max() > 0.05
    return folder, adapted, tmp_path / "peft", *hub.load(folder)


def test_pefts_adapter_gives_the_same_logits(case, parity, feature):
    _, adapted, file, model, params = case
    expected = torch_logits(adapted)
    found = np.abs(model(hub.load_adapter(params, file), TOKENS) - expected).max() / np.abs(expected).max()
    parity("format", f"PEFT adapter, {feature}", "in", found)
    assert found < 1e-4


def test_written_again_it_has_the_same_tensors_and_logits(case, parity, feature, tmp_path):
    folder, adapted, file, _, params = case
    loaded = hub.load_adapter(params, file)
    hub.save_adapter(tmp_path / "again", loaded, base=str(folder))
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "again", file))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    expected = torch_logits(adapted)
    found = np.abs(torch_logits(opened) - expected).max() / np.abs(expected).max()
    parity("format", f"PEFT adapter, {feature}", "out", found)
    assert found < 1e-4
    again = tree.flatten(hub.load_adapter(params, tmp_path / "again"))
    for path, leaf in tree.flatten(loaded).items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_merged_it_computes_the_same_here_and_in_transformers(case, tmp_path):
    _, adapted, file, model, params = case
    loaded, expected = hub.load_adapter(params, file), torch_logits(adapted)
    near = dict(atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(model(lora.merge(loaded), TOKENS), expected, **near)
    hub.save_model(tmp_path / "merged", model, loaded)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(torch_logits(opened), expected, **near)


def test_dora_on_a_packed_base_is_that_of_its_unpacked_values(llama_folder, tmp_path, quiet):
    folder, reference = llama_folder()
    model, params = hub.load(folder, quant="nf4")
    dense = tree.map_with_path(lambda _, x: quant.dequantize(x) if quant.is_packed(x) else x, params)
    hub.save_model(tmp_path / "dense", model, dense)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    adapted = make_peft(reference, dict(target_modules="all-linear", use_dora=True))
    adapted.save_pretrained(tmp_path / "peft")
    loaded = hub.load_adapter(params, tmp_path / "peft")
    expected = torch_logits(adapted)
    np.testing.assert_allclose(model(loaded, TOKENS), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["dora", "dora, biases", "lora_bias", "tied, one adapter"])
def test_gradients_are_pefts(name, llama_folder, tmp_path, quiet):
    fields, settings = FEATURES[name]
    folder, reference = llama_folder(**fields)
    adapted = make_peft(reference, settings)
    adapted.save_pretrained(tmp_path / "peft")
    model, params = hub.load(folder)
    ids = torch.tensor(TOKENS, dtype=torch.long)
    adapted(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    frozen, trainable = lora.split(hub.load_adapter(params, tmp_path / "peft"))

    def total(trainable):
        return jax.nn.logsumexp(model(lora.combine(frozen, trainable), TOKENS), axis=-1).sum()

    gradients = lora.combine(frozen, jax.jit(jax.grad(total))(trainable))
    hub.save_adapter(tmp_path / "gradients", gradients)
    found = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    for key, parameter in adapted.named_parameters():
        tensor = key.replace(".default", "")
        if not parameter.requires_grad or "lm_head" in key or "embed_tokens" in key:
            continue
        expected = parameter.grad.numpy()
        value = found[tensor.removesuffix(".weight") if "magnitude" in tensor else tensor]
        np.testing.assert_allclose(value, expected, atol=1e-3 * np.abs(expected).max(), err_msg=key)
    if "ensure_weight_tying" in settings:  # one parameter here, two there: its gradient is the sum of theirs
        grads = {key.replace(".default", ""): value.grad for key, value in adapted.named_parameters()}
        embedding, head = "base_model.model.model.embed_tokens.lora_embedding_", "base_model.model.lm_head.lora_"
        for ours, theirs in (("A", "B"), ("B", "A")):
            expected = (grads[f"{embedding}{ours}"] + grads[f"{head}{theirs}.weight"].T).numpy()
            value = found[f"{embedding}{ours}"]
            np.testing.assert_allclose(value, expected, atol=1e-3 * np.abs(expected).max())


def test_a_tied_head_that_differs_from_its_embedding_is_refused(llama_folder, tmp_path, quiet):
    fields, settings = FEATURES["tied, one adapter"]
    folder, reference = llama_folder(**fields)
    adapted = make_peft(reference, settings)
    adapted.save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=r"lm_head\.lora_A\.weight is not the same as .*embed_tokens\.lora_embedding_B"
    ):
        hub.load_adapter(hub.load(folder)[1], tmp_path / "peft")


MOE = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_local_experts=3,
    num_experts_per_tok=2,
)
PARAMETERS = {
    "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "down": ["experts.down_proj"],
    "up": ["experts.gate_up_proj"],
    "router too": ["gate.weight", "router.weight", "down_proj", "gate_up_proj"],
}


# One of two by default is enough for each, with the other kind of experts.
ALONE = {("down", "Mixtral"), ("up", "GptOss")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.slow] * ((name, kind) in ALONE))
        for name in PARAMETERS
        for kind in ("Mixtral", "GptOss")
    ],
)
def test_experts(name, kind, tmp_path, quiet, parity):
    torch.manual_seed(0)
    reference = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**MOE)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "base")
    adapted = make_peft(reference, dict(target_modules=["q_proj"], target_parameters=PARAMETERS[name]))
    adapted.save_pretrained(tmp_path / "peft")
    model, params = hub.load(tmp_path / "base")
    loaded = hub.load_adapter(params, tmp_path / "peft")
    expected = torch_logits(adapted)
    near = dict(atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(model(loaded, TOKENS), expected, **near)
    parity("format", "PEFT adapter, experts", "in", np.abs(model(loaded, TOKENS) - expected).max() / near["atol"] / 1e4)
    np.testing.assert_allclose(model(lora.merge(loaded), TOKENS), expected, **near)
    hub.save_adapter(tmp_path / "again", loaded, base=str(tmp_path / "base"))
    ours, theirs = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("again", "peft"))
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        np.testing.assert_array_equal(ours[tensor], value, err_msg=tensor)
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    np.testing.assert_allclose(torch_logits(opened), expected, **near)


@pytest.mark.parametrize("name", ["dora, ranks", "tied embedding", "lora_bias"])
def test_folded_every_scale_is_in_b(name, llama_folder, tmp_path, quiet):
    fields, settings = FEATURES[name]
    folder, reference = llama_folder(**fields)
    adapted = make_peft(reference, settings | dict(use_rslora=True))
    adapted.save_pretrained(tmp_path / "peft")
    _, params = hub.load(folder)
    hub.save_adapter(tmp_path / "folded", hub.load_adapter(params, tmp_path / "peft"), base=str(folder), fold=True)
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    config = opened.peft_config["default"]
    assert config.lora_alpha == config.r and not config.use_rslora
    assert config.alpha_pattern == config.rank_pattern
    expected = torch_logits(adapted)
    np.testing.assert_allclose(torch_logits(opened), expected, atol=1e-4 * np.abs(expected).max())
