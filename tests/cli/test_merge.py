"""`jlora merge`: models that transformers opens, mixtures that load as adapters, and no packed sum by accident."""

import json
import pathlib
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import jlora
from jlora import hub, lora, tree
from jlora.cli.main import main

TOKENS = np.arange(20)[None] % 7 + 65


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory):
    """Folders of two adapters that do something."""
    _, params = jlora.load(model_folder)
    found = []
    for number in range(2):
        config = jlora.LoraConfig(r=2 + number, lora_alpha=3, target_modules="all-linear")
        frozen, trainable = lora.split(lora.init(params, config, jax.random.key(number)))
        moved = tree.map_with_path(
            lambda path, leaf: leaf + 0.05 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), trainable
        )
        found.append(str(tmp_path_factory.mktemp("adapter")))
        jlora.save_adapter(found[-1], lora.combine(frozen, moved))
    return found


def logits(folder, adapter=None):
    model, params = jlora.load(folder)
    return np.asarray(model(params if adapter is None else jlora.load_adapter(params, adapter), jnp.asarray(TOKENS)))


@pytest.fixture
def merge(model_folder, tmp_path, capsys):
    """merge(options…) → (exit code, what it printed, the folder that it wrote)."""

    def run(*options):
        end = ".gguf" if any(option.startswith("--gguf") for option in options) else ""
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}{end}"
        code = main(["merge", f"--model={model_folder}", f"--out={out}", *options])
        shown = capsys.readouterr()
        return code, shown.out + shown.err, out

    return run


def test_a_merged_model_is_the_unmerged_one(merge, adapters, model_folder):
    code, shown, out = merge(f"--adapter={adapters[0]}")
    assert code == 0 and "100.00% of the update kept" in shown and "layers/mlp/down_proj/kernel" in shown
    [divergence] = [line for line in shown.splitlines() if line.startswith("KL(")]
    assert float(divergence.split()[-4]) < 1e-6
    expected = logits(model_folder, adapters[0])
    assert np.abs(expected - logits(model_folder)).max() > 1e-2
    np.testing.assert_allclose(logits(out), expected, atol=1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(TOKENS)).logits.numpy(), expected, atol=1e-5)


def test_the_card_tells_what_was_merged(merge, adapters, model_folder):
    _, _, out = merge(f"--adapter={adapters[0]}:0.5", f"--adapter={adapters[1]}:-2", "--quant=nf4", "--lossy")
    card = ModelCard.load(out / "README.md")
    header = card.data
    assert (header.library_name, header.tags, header.get("base_model")) == ("transformers", ["jlora", "lora"], None)
    names = [pathlib.Path(folder).name for folder in adapters]
    told = f"`{names[0]}` × 0.5, `{names[1]}` × -2, combined by `linear`, merged into the base's weights, and packed"
    assert told in card.text and "% of the update kept, error" in card.text
    assert not any(str(pathlib.Path(place).parent) in card.text for place in (*adapters, model_folder, out))


def test_several_adapters_with_weights_are_one(merge, adapters, model_folder):
    pair = [f"--adapter={adapters[0]}:0.5", f"--adapter={adapters[1]}:-2"]
    code, shown, out = merge(*pair, "--adapter_only", "--method=ties", "--density=0.7", "--rank=4")
    assert code == 0 and "ties of 0.5 · " in shown
    model, params = jlora.load(model_folder)
    trees = [jlora.load_adapter(params, folder) for folder in adapters]
    mixed, _ = lora.mix(params, trees, [0.5, -2.0], method="ties", density=0.7, rank=4)
    np.testing.assert_allclose(logits(model_folder, out), model(mixed, jnp.asarray(TOKENS)), atol=1e-5)
    code, _, whole = merge(*pair)
    exact, _ = lora.mix(params, trees, [0.5, -2.0])
    np.testing.assert_allclose(logits(whole), model(exact, jnp.asarray(TOKENS)), atol=2e-5)


def test_a_folded_adapter_has_one_scale(merge, model_folder, tmp_path):
    params = jlora.load(model_folder)[1]
    config = jlora.LoraConfig(r=2, lora_alpha=6, rank_pattern={"v_proj": 3}, init_lora_weights=False)
    jlora.save_adapter(tmp_path / "by-module", lora.init(params, config, jax.random.key(0)))
    code, shown, out = merge(f"--adapter={tmp_path / 'by-module'}", "--adapter_only")
    assert code == 0 and "note: 2 modules with a scale of its own" in shown and "--fold" in shown
    code, shown, folded = merge(f"--adapter={tmp_path / 'by-module'}", "--adapter_only", "--fold")
    assert code == 0 and "note" not in shown
    config = json.loads((folded / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3 and not config["rank_pattern"]
    trees = [tree.flatten(lora.merge(jlora.load_adapter(params, folder))) for folder in (out, folded)]
    for path, leaf in trees[0].items():
        np.testing.assert_allclose(trees[1][path], leaf, atol=1e-5, err_msg=path)
    code, shown, _ = merge(f"--adapter={tmp_path / 'by-module'}", "--fold")
    assert code == 2 and "--fold is for the PEFT adapter that --adapter_only writes" in shown


def test_a_packed_sum_is_written_on_demand_only(merge, adapters, model_folder):
    code, shown, out = merge(f"--adapter={adapters[0]}", "--quant=nf4")
    assert code == 2 and "times its norm: nothing was written" in shown and "--lossy" in shown
    assert not out.exists()
    code, again, out = merge(f"--adapter={adapters[0]}", "--quant=nf4", "--lossy")
    assert code == 0 and again.splitlines()[0] == shown.splitlines()[0]
    assert jlora.quant.is_packed(jlora.load(out)[1]["layers"]["mlp"]["up_proj"]["kernel"])


def test_an_unmeasured_merge_writes_the_same(merge, adapters, tmp_path):
    written = []
    for options in ([], ["--unmeasured"]):
        code, shown, out = merge(f"--adapter={adapters[0]}", *options)
        assert code == 0 and ("of the update kept" in shown) == (not options)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    for options in (["--quant=nf4"], ["--adapter_only"], ["--data=records.jsonl"]):
        code, shown, out = merge(f"--adapter={adapters[0]}", "--unmeasured", *options)
        assert code == 2 and "--unmeasured" in shown and not out.exists()


def test_what_another_program_wrote_is_left_alone(adapters, model_folder, tmp_path, capsys):
    """A model or an adapter, until --force says so; what jlora wrote is written again without it."""
    import peft

    asked = ["merge", f"--model={model_folder}", f"--adapter={adapters[0]}", "--unmeasured"]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    model.save_pretrained(tmp_path / "model")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for out, options in ((tmp_path / "model", asked), (tmp_path / "adapter", [*asked[:3], "--adapter_only"])):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert main([*options, f"--out={out}"]) == 2
        assert "that jlora did not write, so it is left alone" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert main([*options, f"--out={out}", "--force"]) == 0
        assert main([*options, f"--out={out}"]) == 0
    (tmp_path / "model" / "README.md").write_text("Mine.\n")
    assert main([*asked, f"--out={tmp_path / 'model'}"]) == 0
    assert (tmp_path / "model" / "README.md").read_text() == "Mine.\n"
    capsys.readouterr()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FileExistsError, match=r"that jlora did not write, so it is left alone; .*force=True"):
        jlora.save_model(tmp_path / "model", *jlora.load(model_folder))
    assert main([*asked, f"--out={tmp_path / 'model'}"]) == 2
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "config.json").write_text("{}")
    assert main([*asked, f"--out={tmp_path / 'settings'}"]) == 2
    assert (tmp_path / "settings" / "config.json").read_text() == "{}"


def test_a_bias_that_the_model_has_not_is_refused_before_anything_is_merged(merge, model_folder, tmp_path):
    params = lora.init(jlora.load(model_folder)[1], jlora.LoraConfig(r=2, lora_bias=True), jax.random.key(0))
    jlora.save_adapter(tmp_path / "biased", params)
    for options in ([], ["--gguf=f32"], ["--quant=nf4", "--lossy"]):
        code, shown, out = merge(f"--adapter={tmp_path / 'biased'}", *options)
        assert code == 2 and "q_proj: the adapter adds a bias where the model has none" in shown
        assert "kept" not in shown and not out.exists()


def test_mistakes_are_named(merge, adapters, model_folder):
    first = f"--adapter={adapters[0]}"
    for options, message in (
        ([first, "--adapter_only", "--quant=nf4"], "--quant packs a merged model"),
        ([first, first], "found a folder twice"),
        ([first, f"--adapter={adapters[1]}", "--method=ties"], "density: is required by 'ties'"),
        ([first + ":nan"], "found nan, expected finite numbers"),
        ([first + ":1e300"], "found 1e+300, expected finite numbers of float32"),
        (["--adapter=nowhere:2"], "nowhere"),
        ([first, f"--out={adapters[0]}", "--adapter_only"], f"is also --adapter={adapters[0]}; choose another place"),
        ([first, f"--out={model_folder}"], "is also --model; choose another place"),
    ):
        code, shown, out = merge(*options)
        assert code == 2 and message in shown, shown
        assert not out.exists()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_to_gguf(merge, adapters, model_folder, kind):
    code, shown, out = merge(f"--adapter={adapters[0]}", f"--gguf={kind}")
    assert code == 0
    [share] = [float(line.split("%")[0]) for line in shown.splitlines() if "of the update kept" in line]
    assert 99 < share < 101
    np.testing.assert_allclose(logits(out), logits(model_folder, adapters[0]), atol=2e-3 if kind == "f16" else 2e-2)
    assert jlora.load_tokenizer(out)("AB").input_ids == jlora.load_tokenizer(model_folder)("AB").input_ids


def test_to_a_packed_gguf_file(merge, adapters, model_folder):
    """Under llama.cpp's own name of it, in capitals too; another name is refused with the list of those known."""
    code, shown, out = merge(f"--adapter={adapters[0]}", "--gguf=Q4_K_M")
    assert code == 0 and "of the update kept" in shown
    assert gguf.GGUFReader(out).fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert np.corrcoef(logits(out).ravel(), logits(model_folder, adapters[0]).ravel())[0, 1] > 0.99
    code, shown, out = merge(f"--adapter={adapters[0]}", "--gguf=q4_k")
    assert code == 2 and "invalid choice: 'q4_k'" in shown and "q4_k_m" in shown and "q2_k" in shown
    assert not out.exists()


def test_a_modelfile(merge, adapters, model_folder, tmp_path):
    ends = [
        jlora.load_tokenizer(model_folder).decode([end]) for end in jlora.load(model_folder)[0].config.eos_token_ids
    ]
    options = [f"--adapter={adapters[0]}", "--gguf=f16", "--modelfile", "--system=Answer in one word."]
    code, shown, out = merge(*options, "--unmeasured")
    assert code == 0 and f"ollama create {out.stem} -f {tmp_path / 'Modelfile'}" in shown
    lines = (tmp_path / "Modelfile").read_text().splitlines()[1:]
    assert ends and set(lines) >= {f"PARAMETER stop {end}" for end in ends}
    assert lines[0] == f"FROM ./{out.name}" and lines[-2] == "SYSTEM Answer in one word."
    code, _, out = merge(*options, "--adapter_only")
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert code == 0 and {f"FROM {model_folder}", f"ADAPTER ./{out.name}"} <= set(lines)


def test_a_modelfile_that_cannot_be_is_refused_before_the_model_is_loaded(merge, adapters, tmp_path):
    adapter = f"--adapter={adapters[0]}"
    (tmp_path / "Modelfile").write_text("FROM mine\n")
    for options, said in {
        ("--modelfile",): "--modelfile is for a GGUF file",
        ("--gguf=f16", "--system=Hi"): "--system is for the Modelfile",
        ("--gguf=f16", "--modelfile", "--model=nowhere"): "is not from jlora",
        ("--gguf=f16", "--modelfile", "--force", "--system=a\u00a0b", "--model=nowhere"): "U+00A0",
    }.items():
        code, shown, out = merge(adapter, *options)
        assert code == 2 and said in shown and not out.exists()
    assert (tmp_path / "Modelfile").read_text() == "FROM mine\n"


@pytest.mark.parametrize("base", ["folder", "gguf"])
def test_a_gguf_file_has_the_tokenizer_that_is_said_to_be_used(adapters, model_folder, tmp_path, base, capsys):
    adapter, out = tmp_path / "adapter", tmp_path / "out.gguf"
    shutil.copytree(adapters[0], adapter)
    tokenizer = jlora.load_tokenizer(model_folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(adapter)
    if base == "gguf":
        hub.save_gguf(tmp_path / "base.gguf", *jlora.load(model_folder), model_folder)
        model_folder = tmp_path / "base.gguf"
    with pytest.warns(UserWarning, match="in its chat template: the adapter's is used"):
        assert main(["merge", f"--model={model_folder}", f"--adapter={adapter}", "--gguf=f16", f"--out={out}"]) == 0
    assert jlora.load_tokenizer(out).chat_template == tokenizer.chat_template


def test_an_adapter_is_written_without_a_tokenizer(merge, adapters, monkeypatch):
    monkeypatch.setattr(hub, "load_tokenizer", None)
    assert merge(f"--adapter={adapters[0]}", "--adapter_only")[0] == 0


def test_records_that_are_wrong_are_refused_or_left_out(merge, adapters, tmp_path):
    rows = [{"prompt": "AB", "completion": "CD"}, {"prompt": 3}, {"prompt": "", "completion": ""}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"--adapter={adapters[0]}", f"--data={tmp_path / 'data.jsonl'}"]
    code, shown, out = merge(*options)
    assert code == 2 and "of 3 records cannot be used" in shown and "(--on_error=skip)" in shown and not out.exists()
    code, shown, _ = merge(*options, "--on_error=skip")
    assert code == 0 and "are left out" in shown and "KL(" in shown


def test_an_adapter_to_gguf(merge, adapters, model_folder):
    code, shown, out = merge(f"--adapter={adapters[0]}", "--adapter_only", "--gguf=f32")
    assert code == 0 and f"adapter (GGUF): {out}" in shown
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}
    expected = tree.flatten(jlora.load_adapter(jlora.load(model_folder)[1], adapters[0]))
    np.testing.assert_array_equal(
        tensors["blk.1.ffn_up.weight.lora_a"], np.asarray(expected["layers/mlp/up_proj/lora_a"][1]).T
    )


def test_sums_are_formed_on_the_unpacked_base_and_rounded_once(make_llama, tmp_path):
    folder = make_llama(hidden_size=32, intermediate_size=64, num_attention_heads=2)
    hub.save_gguf(tmp_path / "base.gguf", *jlora.load(folder), folder, dtype="q8_0")
    _, base = jlora.load(tmp_path / "base.gguf", dtype="float32")
    config = jlora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    params = lora.init(base, config, jax.random.key(0))
    jlora.save_adapter(tmp_path / "adapter", params)
    inputs = [f"--model={tmp_path / 'base.gguf'}", f"--adapter={tmp_path / 'adapter'}"]
    assert main(["merge", *inputs, f"--out={tmp_path / 'out'}"]) == 0
    _, found = jlora.load(tmp_path / "out", dtype="bfloat16")
    for path, leaf in tree.flatten(lora.merge(params)).items():
        np.testing.assert_array_equal(tree.flatten(found)[path], leaf.astype(jnp.bfloat16), err_msg=path)


def test_a_gguf_file_that_cannot_be_is_refused_before_the_model_is_loaded(adapters, tmp_path, capsys):
    inputs = ["merge", "--model=nowhere", f"--adapter={adapters[0]}"]
    assert main([*inputs, f"--out={tmp_path / 'out'}", "--gguf=f16"]) == 2
    assert "expected a name that ends in .gguf" in capsys.readouterr().err
    assert main([*inputs, f"--out={tmp_path / 'out.gguf'}", "--adapter_only", "--gguf=q8_0"]) == 2
    assert "a GGUF adapter is written in one of f32, f16, bf16" in capsys.readouterr().err


def test_gguf_goes_without_quant_and_dtype(merge, adapters):
    code, shown, out = merge(f"--adapter={adapters[0]}", "--gguf=f16", "--quant=nf4", "--lossy")
    assert code == 2 and "give one of them" in shown and not out.exists()
    code, shown, out = merge(f"--adapter={adapters[0]}", "--gguf=f16", "--dtype=float32")
    assert code == 2 and "--dtype has no effect" in shown and not out.exists()
