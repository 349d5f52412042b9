"""What a merge kept, printed."""

import jax
import transformers

import jlora
from jlora import hub, lora, models
from jlora.cli.kept import print_kept


def test_a_reward_model_goes_without_the_other_head(model_folder, capsys):
    model, base = jlora.load(model_folder)
    config = jlora.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    params = model.add_score(lora.init(base, config, jax.random.key(0)), jax.random.key(1))
    written = {name: module for name, module in lora.merge(params).items() if name != "lm_head"}
    report = print_kept(model, params, written, hub.load_tokenizer(model_folder))
    assert [module.path for module in report.modules] == ["embed_tokens/embedding", "layers/self_attn/q_proj/kernel"]
    assert "KL(unmerged ‖ merged): 0.00e+00" in capsys.readouterr().out


def test_probes_are_no_longer_than_the_model_has_positions(model_folder, capsys):
    tokenizer = hub.load_tokenizer(model_folder)
    sizes = dict(vocab_size=len(tokenizer), n_positions=40, n_embd=16, n_layer=1, n_head=2)
    model = models.build(transformers.GPT2Config(**sizes).to_dict())
    params = lora.init(jax.jit(model.random_params)(jax.random.key(0)), jlora.LoraConfig(r=2), jax.random.key(1))
    print_kept(model, params, lora.merge(params), tokenizer)
    assert "KL(unmerged ‖ merged): 0.00e+00" in capsys.readouterr().out
