import jax

import jlora
from jlora.cli import generate as command
from jlora.cli.main import main


def texts(capsys, model, *arguments):
    capsys.readouterr()
    assert main(["generate", f"--model={model}", "--max_new_tokens=8", *arguments]) == 0
    return capsys.readouterr().out


def test_the_same_command_gives_the_same_text(model_folder, capsys):
    first = texts(capsys, model_folder, "--prompt=1+1=")
    assert first.strip()
    assert texts(capsys, model_folder, "--prompt=1+1=") == first


def test_the_template_the_temperature_and_the_seed_matter(model_folder, capsys):
    variants = [(), ("--raw",), ("--temperature=1", "--seed=1"), ("--temperature=1", "--seed=2")]
    found = {texts(capsys, model_folder, "--prompt=1+1=", *variant) for variant in variants}
    assert len(found) == len(variants)


def test_a_system_message_goes_before_the_prompt(model_folder, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "generate", lambda *arguments, **settings: seen.append(arguments[3]) or [])
    texts(capsys, model_folder, "--prompt=x", "--system=Be brief.")
    texts(capsys, model_folder, "--prompt=x", "--raw")
    assert seen == [[[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]], ["x"]]


def test_several_prompts_are_answered_in_order(model_folder, capsys):
    apart = [texts(capsys, model_folder, f"--prompt={prompt}", "--raw") for prompt in ("a", "bb")]
    assert texts(capsys, model_folder, "--prompt=a", "--prompt=bb", "--raw") == "".join(apart)


def test_every_prompt_has_its_adapter(model_folder, tmp_path, capsys):
    _, params = jlora.load(model_folder)
    config = jlora.LoraConfig(r=2, init_lora_weights=False, lora_alpha=400, target_modules="all-linear")
    jlora.save_adapter(tmp_path / "adapter", jlora.lora.init(params, config, jax.random.key(0)))
    adapters, prompts = [str(tmp_path / "adapter"), ""], ["--prompt=a", "--prompt=a"]
    apart = [
        texts(capsys, model_folder, prompt, "--raw", *([f"--adapter={adapter}"] if adapter else []))
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    assert apart[0] != apart[1]
    together = texts(capsys, model_folder, *prompts, "--raw", *(f"--adapter={adapter}" for adapter in adapters))
    assert together == "".join(apart)
    three = [*prompts, "--prompt=c"]
    assert main(["generate", f"--model={model_folder}", *three, "--adapter=x", "--adapter=y"]) == 2
    assert "--adapter: found 2 for 3 prompts" in capsys.readouterr().err


def test_prompts_of_one_adapter_need_no_bank(model_folder, tmp_path, capsys):
    _, params = jlora.load(model_folder)
    config = jlora.LoraConfig(r=2, init_lora_weights=False, use_dora=True)  # which a bank does not hold
    jlora.save_adapter(tmp_path / "dora", jlora.lora.init(params, config, jax.random.key(0)))
    adapter = f"--adapter={tmp_path / 'dora'}"
    once = texts(capsys, model_folder, "--prompt=a", "--prompt=c", "--raw", adapter)
    assert texts(capsys, model_folder, "--prompt=a", "--prompt=c", "--raw", adapter, adapter) == once
