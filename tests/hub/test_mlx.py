"""mlx-lm's adapter folders, written here by its rules, against the same change made to transformers' weights."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

import jlora
from jlora import hub

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2, 11]], np.int32)
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
RANK = 3


def config(**changes):
    """mlx-lm's adapter_config.json, with some of the training settings that it holds as well."""
    lora = {"rank": RANK, "scale": 2.5, "dropout": 0.0} | changes.pop("lora_parameters", {})
    return {"fine_tune_type": "lora", "num_layers": 16, "model": "x", "iters": 5, "lora_parameters": lora} | changes


def old_config(**changes):
    """That of the first versions, whose scale is scale · alpha / rank."""
    found = config(lora_parameters={"alpha": 6.0, "keys": LINEARS[:2]} | changes.pop("lora_parameters", {}))
    return {key: value for key, value in found.items() if key not in ("fine_tune_type", "num_layers")} | changes


def layers(indices, linears=LINEARS):
    return [f"model.layers.{i}.{name}" for i in indices for name in linears]


# (fields of the model, config, adapted modules, what A @ B is multiplied by)
CASES = {
    "lora": ({}, config(), layers(range(3)), 2.5),
    "all layers": ({}, config(num_layers=-1), layers(range(3)), 2.5),
    "last layers": ({}, config(num_layers=2), layers([1, 2]), 2.5),
    "keys": (
        {},
        config(num_layers=1, lora_parameters={"keys": ["self_attn.v_proj", "mlp.down_proj", "lm_head"]}),
        [*layers([2], ["self_attn.v_proj", "mlp.down_proj"]), "lm_head"],
        2.5,
    ),
    "embedding": (
        {},
        config(lora_parameters={"keys": ["model.embed_tokens", "mlp.up_proj"]}),
        [*layers(range(3), ["mlp.up_proj"]), "model.embed_tokens"],
        2.5,
    ),
    "embedding that is the head": (
        {"tie_word_embeddings": True},
        config(lora_parameters={"keys": ["model.embed_tokens"]}),
        ["model.embed_tokens"],
        2.5,
    ),
    "dora": ({}, config(fine_tune_type="dora"), layers(range(3)), 2.5),
    "dora, last layer, biases": (
        {"attention_bias": True, "mlp_bias": True},
        config(fine_tune_type="dora", num_layers=1),
        layers([2]),
        2.5,
    ),
    "old": ({}, old_config(lora_layers=2), layers([1, 2], LINEARS[:2]), 5.0),
    "old, all layers, dora": ({}, old_config(lora_layers=-1, use_dora=True), layers(range(3), LINEARS[:2]), 5.0),
    "old, without keys": (
        {},
        old_config(lora_layers=1, lora_parameters={"keys": None}),
        layers([2], LINEARS[:3:2]),
        5.0,
    ),
}


def uses_dora(fields):
    return fields.get("fine_tune_type") == "dora" or fields.get("use_dora", False)


def write(folder, fields, names, model):
    """The folder, and its random tensors."""
    rng, tensors = np.random.default_rng(0), {}
    modules = dict(model.named_modules())
    for name in names:
        weight = modules[name].weight.detach().numpy()
        inputs, outputs = weight.shape if "embed" in name else weight.shape[::-1]
        tensors[f"{name}.lora_a"] = rng.normal(size=(inputs, RANK)).astype(np.float32) / 5
        tensors[f"{name}.lora_b"] = rng.normal(size=(RANK, outputs)).astype(np.float32) / 5
        if uses_dora(fields):
            lengths = np.linalg.norm(weight, axis=1)
            tensors[f"{name}.m"] = (lengths * rng.uniform(0.7, 1.3, lengths.shape)).astype(np.float32)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapters.safetensors")
    return tensors


def change(model, names, tensors, scale):
    """What mlx-lm computes, made part of the weights."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in names:
            weight = modules[name].weight
            update = tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"] * scale
            changed = weight.numpy() + (update if "embed" in name else update.T)
            if f"{name}.m" in tensors:
                changed *= (tensors[f"{name}.m"] / np.linalg.norm(changed, axis=1))[:, None]
            weight.copy_(torch.tensor(changed))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long), use_cache=False).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_changed_weights(case, llama_folder, tmp_path, parity):
    fields, settings, names, scale = CASES[case]
    folder, reference = llama_folder(**fields)
    plain = torch_logits(reference)
    tensors = write(tmp_path / "mlx", settings, names, reference)
    change(reference, names, tensors, scale)
    expected = torch_logits(reference)
    assert np.abs(expected - plain).max() > 0.05
    model, params = hub.load(folder)
    found = np.abs(model(jlora.load_adapter(params, tmp_path / "mlx"), TOKENS) - expected).max()
    parity("format", f"mlx-lm adapter, {case}", "in", found / np.abs(expected).max())
    assert found < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_names_that_mlx_has_for_other_models(kind, tmp_path):
    sizes = dict(vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80)
    torch.manual_seed(0)
    if kind == "gpt2":
        theirs = transformers.GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=3, n_positions=64)
        reference = transformers.GPT2LMHeadModel(theirs).eval()
        keys, start = ["attn.c_attn"], "transformer.h"
    else:
        theirs = transformers.GPTNeoXConfig(**sizes, max_position_embeddings=64)
        reference, keys, start = (
            transformers.GPTNeoXForCausalLM(theirs).eval(),
            ["mlp.dense_4h_to_h"],
            "gpt_neox.layers",
        )
    reference.save_pretrained(tmp_path / "base")
    model, params = hub.load(tmp_path / "base")
    rng, tensors = np.random.default_rng(0), {}
    inputs, outputs = (48, 144) if kind == "gpt2" else (80, 48)
    with torch.no_grad():
        for i in range(2):
            a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((inputs, RANK), (RANK, outputs)))
            tensors |= {f"model.h.{i}.{keys[0]}.lora_a": a, f"model.h.{i}.{keys[0]}.lora_b": b}
            weight = dict(reference.named_parameters())[f"{start}.{i}.{keys[0]}.weight"]
            weight += torch.tensor(2.5 * (a @ b if kind == "gpt2" else (a @ b).T))
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config(lora_parameters={"keys": keys})))
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    expected = torch_logits(reference)
    found = model(hub.load_adapter(params, tmp_path / "mlx"), TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_layers_left_out_have_rank_0_and_dropout_is_kept(llama_folder, tmp_path):
    folder, reference = llama_folder()
    fields = config(num_layers=1, lora_parameters={"dropout": 0.25})
    write(tmp_path / "mlx", fields, layers([2]), reference)
    module = hub.load_adapter(hub.load(folder)[1], tmp_path / "mlx")["layers"]["self_attn"]["k_proj"]
    assert module["lora_rank"].tolist() == [0, 0, RANK] and module["lora_scale"].tolist() == [0, 0, 2.5]
    assert module["lora_dropout"].tolist() == [0.25] * 3
    assert module["lora_a"].shape == (3, 48, RANK) and module["lora_b"].shape == (3, RANK, 20)


def test_written_for_peft_it_is_the_same_adapter(llama_folder, tmp_path):
    folder, reference = llama_folder()
    write(tmp_path / "mlx", config(), layers(range(3)), reference)
    model, params = hub.load(folder)
    loaded = hub.load_adapter(params, tmp_path / "mlx")
    hub.save_adapter(tmp_path / "peft", loaded)
    again = hub.load_adapter(params, tmp_path / "peft")
    np.testing.assert_array_equal(model(again, TOKENS), model(loaded, TOKENS))


def test_an_alpha_that_was_left_in_place_is_ignored(llama_folder, tmp_path):
    folder, reference = llama_folder()
    write(tmp_path / "mlx", config(lora_parameters={"alpha": 6.0}), layers(range(3)), reference)
    with pytest.warns(UserWarning, match="alpha is ignored"):
        loaded = hub.load_adapter(hub.load(folder)[1], tmp_path / "mlx")
    assert loaded["layers"]["mlp"]["up_proj"]["lora_scale"].tolist() == [2.5] * 3


# name → (what happens to the tensors, what the message must say)
Q = "model.layers.1.self_attn.q_proj"
BROKEN = {
    "missing": (lambda t: t.pop(f"{Q}.lora_b"), f"missing {Q}.lora_b"),
    "misshapen": (lambda t: t.update({f"{Q}.lora_a": t[f"{Q}.lora_a"].T}), f"{Q}.lora_a has shape"),
    "of an earlier layer": (lambda t: t.update({Q.replace("1", "0") + ".lora_a": t[f"{Q}.lora_a"]}), "does not target"),
    "of no linear": (lambda t: t.update({"model.norm.lora_a": t[f"{Q}.lora_a"]}), "no such linear"),
    "a magnitude": (lambda t: t.update({f"{Q}.m": np.ones(60, np.float32)}), f"unknown {Q}.m"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_do_not_fit_are_listed(name, llama_folder, tmp_path):
    damage, message = BROKEN[name]
    folder, reference = llama_folder()
    tensors = write(tmp_path / "mlx", config(num_layers=2), layers([1, 2]), reference)
    damage(tensors)
    save_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / "mlx/adapters.safetensors"
    )
    with pytest.raises(ValueError, match=f"nothing was loaded(.|\n)*{message}"):
        hub.load_adapter(hub.load(folder)[1], tmp_path / "mlx")


FIELDS = [
    (config(fine_tune_type="full", lora_parameters={}), "whole weights"),
    (config(fine_tune_type="magic", num_layers=None), "'magic'(.|\n)*num_layers is None"),
    (config(lora_parameters={"rank": 0, "scale": "x", "keys": "q_proj"}), "rank is 0(.|\n)*scale is 'x'(.|\n)*keys"),
    (config(fine_tune_type="dora", lora_parameters={"keys": ["model.embed_tokens"]}), "DoRA of model.embed_tokens"),
]


@pytest.mark.parametrize("fields, message", FIELDS)
def test_fields_that_cannot_be_are_errors(fields, message, llama_folder, tmp_path):
    folder, reference = llama_folder()
    write(tmp_path / "mlx", fields, ["model.embed_tokens"], reference)
    with pytest.raises(ValueError, match=message):
        hub.load_adapter(hub.load(folder)[1], tmp_path / "mlx")


def test_experts_are_named(llama_folder, tmp_path):
    folder, reference = llama_folder()
    tensors = write(tmp_path / "mlx", config(), layers(range(3)), reference)
    tensors["model.layers.0.mlp.switch_mlp.up_proj.lora_a"] = np.ones((2, RANK, 48), np.float32)
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises(ValueError, match="adapts experts"):
        hub.load_adapter(hub.load(folder)[1], tmp_path / "mlx")


def test_without_its_tensors_the_folder_is_named(llama_folder, tmp_path):
    folder, reference = llama_folder()
    write(tmp_path / "mlx", config(), layers(range(3)), reference)
    (tmp_path / "mlx" / "adapters.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapters\.safetensors"):
        hub.load_adapter(hub.load(folder)[1], tmp_path / "mlx")
