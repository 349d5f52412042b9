import jax
import pytest

import jlora
from jlora.cli import generate as command
from jlora.cli.main import main
from jlora.cli.model import load_model
from jlora.cli.parsers import parse


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


def test_a_mesh_changes_no_text(model_folder, tmp_path, capsys):
    """A bank of two adapters, packed weights, and devices that heads do not divide by."""
    _, params = jlora.load(model_folder)
    for seed, name in enumerate(("one", "two")):
        config = jlora.LoraConfig(r=2, init_lora_weights=False, lora_alpha=400, target_modules="all-linear")
        jlora.save_adapter(tmp_path / name, jlora.lora.init(params, config, jax.random.key(seed)))
    asked = ["--prompt=a", "--prompt=bb", "--quant=nf4", *(f"--adapter={tmp_path / name}" for name in ("one", "two"))]
    assert texts(capsys, model_folder, *asked, "--mesh.tensor=2", "--mesh.fsdp=-1") == texts(
        capsys, model_folder, *asked
    )


def test_weights_are_placed_as_they_are_loaded(model_folder):
    options = parse("generate", [f"--model={model_folder}", "--prompt=x", "--mesh.tensor=2", "--mesh.data=-1"])
    _, params, _ = load_model(options)
    (mesh,) = {leaf.sharding.mesh for leaf in jax.tree.leaves(params)}
    assert mesh.shape == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1}


@pytest.mark.parametrize("command", ["generate --prompt=x", "chat", "serve --port=0", "eval --data={data}"])
def test_devices_that_are_not_there_are_missed_before_anything_is_loaded(command, data_file, capsys):
    assert main([*command.format(data=data_file).split(), "--model=nowhere", "--mesh.tensor=3"]) == 2
    assert capsys.readouterr().err.endswith("sizes multiply to 3, but the number of devices is 8\n")
