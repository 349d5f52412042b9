"""Updates against torch's AdamW, what decays, and the second lock."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

from jlora import lora, tree
from jlora.optim import OptimConfig, make_optimizer


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_updates_are_torchs_adamw(clip):
    rng = np.random.default_rng(0)
    start = {"lora_a": rng.normal(size=(4, 3)), "lora_b": rng.normal(size=(3, 5))}
    # Some below the norm that is clipped to: Adam would not see all of them scaled alike.
    grads = [{name: size * rng.normal(size=value.shape) for name, value in start.items()} for size in (0.05, 1, 3, 0.1)]
    weights = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in start.items()}
    groups = [{"params": [weights["lora_a"]], "lr": 0.01}, {"params": [weights["lora_b"]], "lr": 0.04}]
    reference = torch.optim.AdamW(groups, weight_decay=0.1)
    config = OptimConfig(
        learning_rate=0.01, schedule="constant", weight_decay=0.1, loraplus_lr_ratio=4.0, max_grad_norm=clip
    )
    optimizer = make_optimizer(config, 10)
    params = {"proj": {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}}
    state = optimizer.init(params)
    for grad in grads:
        for name, weight in weights.items():
            weight.grad = torch.tensor(grad[name], dtype=torch.float32)
        if clip:
            torch.nn.utils.clip_grad_norm_(list(weights.values()), clip)
        reference.step()
        updates, state = optimizer.update(
            {"proj": {n: jnp.asarray(g, jnp.float32) for n, g in grad.items()}}, state, params
        )
        params = optax.apply_updates(params, updates)
    for name, weight in weights.items():
        np.testing.assert_allclose(params["proj"][name], weight.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_a_frozen_leaf_gets_no_update_even_with_a_gradient():
    params = {"proj": {"kernel": jnp.ones((2, 2)), "lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}}
    optimizer = make_optimizer(OptimConfig(weight_decay=0.5), 10)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert not np.any(updates["proj"]["kernel"]) and np.all(updates["proj"]["lora_a"])


def test_what_transformers_does_not_decay_does_not_decay():
    settings = dict(tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1, **settings)
    adapted = peft.get_peft_model(
        transformers.GPT2LMHeadModel(config),
        peft.LoraConfig(
            target_modules=["c_attn"],
            bias="all",
            lora_bias=True,
            modules_to_save=["ln_f", "lm_head"],
            fan_in_fan_out=True,
        ),
    )
    decayed = transformers.Trainer.get_decay_parameter_names(None, adapted)
    # jlora's path of a leaf, and what the parameter is called in PEFT.
    names = {
        "attn/c_attn/lora_a": "attn.c_attn.lora_A.default.weight",
        "attn/c_attn/lora_b": "attn.c_attn.lora_B.default.weight",
        "attn/c_attn/lora_bias": "attn.c_attn.lora_B.default.bias",
        "attn/c_proj/trained_bias": "attn.c_proj.bias",
        "ln_f/trained_scale": "ln_f.modules_to_save.default.weight",
        "ln_f/trained_bias": "ln_f.modules_to_save.default.bias",
        "lm_head/trained_kernel": "lm_head.modules_to_save.default.weight",
    }
    params = tree.unflatten({path: jnp.ones((2,)) for path in names})
    optimizer = make_optimizer(OptimConfig(weight_decay=0.5, schedule="constant"), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = tree.flatten(optimizer.update(zeros, optimizer.init(params), params)[0])
    known = [name for name, _ in adapted.named_parameters()]
    for path, name in names.items():
        (full,) = [other for other in known if other.endswith(f".{name}")]
        assert bool(np.any(updates[path])) == (full in decayed), path


def test_the_state_is_that_of_optax_adamw():
    """Checkpoints of every version hold it; another structure would not open."""
    params = {"proj": {"lora_a": jnp.ones((2, 1)), "trained_bias": jnp.ones((2,))}}
    alone = {"lora_a": optax.adamw(optax.constant_schedule(1.0)), "lora_b": optax.adamw(optax.constant_schedule(1.0))}
    alone["frozen"] = optax.set_to_zero()
    expected = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(alone, lora.labels)).init(params)
    assert jax.tree.structure(make_optimizer(OptimConfig(), 10).init(params)) == jax.tree.structure(expected)


def test_magnitudes_decay_as_in_transformers_only_if_asked_to():
    settings = dict(tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, **settings
    )
    peft_config = peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    adapted = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft_config)
    decayed = transformers.Trainer.get_decay_parameter_names(None, adapted)
    assert any("lora_magnitude_vector" in name for name in decayed)
    params = {"q_proj": {"lora_magnitude": jnp.ones((2,)), "lora_a": jnp.ones((2, 2))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for exempt, settings in ((True, {}), (False, {"decay_magnitudes": True})):
        optimizer = make_optimizer(OptimConfig(weight_decay=0.5, **settings), 10)
        updates = optimizer.update(zeros, optimizer.init(params), params)[0]["q_proj"]
        assert np.all(updates["lora_a"]) and bool(np.any(updates["lora_magnitude"])) != exempt
