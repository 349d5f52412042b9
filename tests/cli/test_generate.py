from jlora.cli.main import main


def texts(capsys, model, *arguments):
    capsys.readouterr()
    assert main(["generate", f"--model={model}", "--max_new_tokens=8", *arguments]) == 0
    return capsys.readouterr().out


def test_the_same_command_gives_the_same_text(model_folder, capsys):
    first = texts(capsys, model_folder, "--prompt=1+1=")
    assert first.strip()
    assert texts(capsys, model_folder, "--prompt=1+1=") == first


def test_system_template_temperature_and_seed_matter(model_folder, capsys):
    variants = [
        (),
        ("--system=Be brief.",),
        ("--raw",),
        ("--temperature=1", "--seed=1"),
        ("--temperature=1", "--seed=2"),
    ]
    found = {texts(capsys, model_folder, "--prompt=1+1=", *variant) for variant in variants}
    assert len(found) == len(variants)


def test_several_prompts_are_answered_in_order(model_folder, capsys):
    apart = [texts(capsys, model_folder, f"--prompt={prompt}", "--raw") for prompt in ("a", "bb")]
    assert texts(capsys, model_folder, "--prompt=a", "--prompt=bb", "--raw") == "".join(apart)
