"""MiSS in both directions: PEFT's logits, PEFT's files, and what jlora makes of it that PEFT does not."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jlora import hub, lora, models, quant, tree
from jlora.lora.kinds.miss import MISS

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2, 11]], np.int32)
# 48 and 80 inputs: 7 divides neither, so the last shard is a part.
CASES = {
    "all linears": dict(target_modules="all-linear", r=7),
    "some layers": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], r=4),
    "a norm": dict(target_modules=["up_proj"], modules_to_save=["norm"], r=6),
    "biases": dict(target_modules=["q_proj"], bias="all", r=5),
}


def make_peft(model, settings):
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.MissConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return adapted


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("case", CASES)
def test_files_of_peft_are_read_and_written(case, llama_folder, tmp_path):
    folder, theirs = llama_folder(attention_bias=case == "biases")
    adapted = make_peft(theirs, CASES[case])
    adapted.save_pretrained(tmp_path / "theirs")
    model, base = hub.load(folder, dtype="float32")
    params = hub.load_adapter(base, tmp_path / "theirs")
    expected = logits(adapted)
    np.testing.assert_allclose(model(params, TOKENS), expected, atol=2e-4)
    assert np.abs(expected - np.asarray(model(base, TOKENS))).max() > 0.1
    np.testing.assert_allclose(model(lora.merge(params), TOKENS), expected, atol=2e-4)
    hub.save_adapter(tmp_path / "ours", params, str(folder))
    again = peft.PeftModel.from_pretrained(llama_folder("again", attention_bias=case == "biases")[1], tmp_path / "ours")
    np.testing.assert_allclose(logits(again), expected, atol=1e-5)
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    known = peft.MissConfig.__dataclass_fields__.keys()
    assert fields["peft_type"] == "MISS" and fields.keys() <= known, fields.keys() - known


@pytest.mark.parametrize("start", [True, False])
def test_a_new_adapter_starts_as_pefts_does(start, llama_folder):
    model, base = hub.load(llama_folder()[0], dtype="float32")
    config = lora.LoraConfig(peft_type="MISS", r=8, init_lora_weights=start, lora_dropout=0.1)
    params = lora.init(base, config, jax.random.key(0))
    same = np.allclose(model(params, TOKENS), model(base, TOKENS), atol=1e-5)
    assert same == start
    frozen, trained = lora.split(params)
    assert {path.rpartition("/")[2] for path in tree.flatten(trained)} == {MISS.leaves[0].name}
    product = lora.split(lora.init(base, lora.LoraConfig(r=8), jax.random.key(0)))[1]
    assert lora.drops(frozen) and tree.count(trained) < tree.count(product)
    block = tree.flatten(trained)["layers/self_attn/q_proj/lora_miss_b"]
    theirs = peft.tuners.miss.layer.MissLinear(
        torch.nn.Linear(48, 60), "default", peft.MissConfig(r=8, init_weights=start), r=8
    ).miss_block["default"]
    np.testing.assert_allclose(np.std(block), theirs.detach().std(), rtol=0.15)


def test_a_packed_base_and_every_use_of_one_adapter(llama_folder, tmp_path):
    """Scaled, beside others in a bank, mixed with a LoRA and written for llama.cpp: where a product goes, it goes."""
    model, base = hub.load(llama_folder()[0], dtype="float32", quant=quant.as_config("nf4"))
    config = dict(r=5, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    miss = lora.init(base, lora.LoraConfig(peft_type="MISS", **config), jax.random.key(0))
    other = lora.init(base, lora.LoraConfig(**config), jax.random.key(1))
    expected = np.asarray(model(miss, TOKENS))
    np.testing.assert_allclose(model(lora.with_starts(miss), TOKENS), expected, atol=2e-4)
    np.testing.assert_allclose(model(lora.scaled(miss, 0), TOKENS), model(base, TOKENS), atol=1e-5)
    bank = lora.Bank.of(base, {"miss": miss, "lora": other})
    np.testing.assert_allclose(model(bank.alone("miss"), TOKENS), expected, atol=2e-4)
    mixed, _ = lora.mix(base, [miss, lora.adapter_leaves(miss)], [0.5, 0.5])
    np.testing.assert_allclose(model(mixed, TOKENS), expected, atol=2e-3)
    hub.save_gguf_adapter(tmp_path / "miss.gguf", model, miss)


def test_what_it_cannot_be_is_said(llama_folder, tmp_path, edit_json):
    base = hub.load(llama_folder()[0], dtype="float32")[1]
    key, miss = jax.random.key(0), dict(peft_type="MISS")
    for settings, message in (
        (miss | dict(use_dora=True), "use_dora goes with peft_type='LORA'"),
        (miss | dict(init_lora_weights="pissa"), "expected True"),
        (miss | dict(target_modules=["embed_tokens"]), "for linears; embed_tokens"),
        (miss | dict(r=99, target_modules=["q_proj"]), "rank 99 is more than its 48 inputs"),
        (miss | dict(r=4, rank_pattern={"layers.1.*q_proj": 2}), r"one rank for all layers of a stack, found \[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.init(base, lora.LoraConfig(**settings), key)
    elsewhere = {"nowhere": {"lora_miss_b": jnp.ones((4, 9)), "lora_scale": jnp.float32(1)}}
    with pytest.raises(ValueError, match="nowhere/lora_miss_b is more than a bank holds"):
        lora.Bank.of(base, {"elsewhere": elsewhere})
    experts = dict(model_type="qwen3_moe", vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    experts |= dict(
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    mixture = jax.jit(models.build(experts).random_params)(key)
    settings = miss | dict(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], r=2)
    with pytest.raises(ValueError, match="for linears; layers/mlp/experts/down_proj"):
        lora.init(mixture, lora.LoraConfig(**settings), key)
    params = lora.init(base, lora.LoraConfig(**miss, r=4, rank_pattern={"q_proj": 2}), key)
    with pytest.raises(ValueError, match=r"PEFT's MISS adapters have no .*rank_pattern"):
        hub.save_adapter(tmp_path / "ranks", params)
    hub.save_adapter(tmp_path / "good", lora.init(base, lora.LoraConfig(**miss), key))
    edit_json(tmp_path / "good" / "adapter_config.json", init_weights="bat")
    with pytest.raises(ValueError, match=re.escape("init_weights='bat' is not supported")):
        hub.load_adapter(base, tmp_path / "good")


def test_a_scale_goes_into_the_file(llama_folder, tmp_path):
    model, base = hub.load(llama_folder()[0], dtype="float32")
    config = lora.LoraConfig(peft_type="MISS", r=4, init_lora_weights=False)
    params = lora.scaled(lora.init(base, config, jax.random.key(0)), 0.5)
    hub.save_adapter(tmp_path / "half", params)
    read = hub.load_adapter(base, tmp_path / "half")
    np.testing.assert_allclose(model(read, TOKENS), model(params, TOKENS), atol=1e-5)
    assert jnp.all(read["layers"]["self_attn"]["q_proj"]["lora_scale"] == 1)
