"""What is published: the result alone, a card that the Hub's own classes read, and nothing of this machine."""

import json
import pathlib
import shutil

import huggingface_hub
import peft
import pytest
import transformers
from huggingface_hub import ModelCard

from jlora import hub
from jlora.cli.main import main
from jlora.hub import publishing

BASE = "owner/base"


@pytest.fixture(scope="module")
def run(trained, model_folder, tmp_path_factory):
    """The workdir of a run whose base has a licence."""
    base = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(model_folder, base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# Tiny\n")
    workdir = tmp_path_factory.mktemp("runs") / "first"
    shutil.copytree(trained, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["path"] = str(base)
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def test_an_adapter_with_a_card_of_its_run(run, model_folder, tmp_path, capsys):
    out = tmp_path / "tiny-lora"
    (run / "adapter" / "notes.txt").write_text("secret")
    assert main(["publish", f"--workdir={run}", f"--base={BASE}", f"--out={out}"]) == 0
    assert "left out, as no part of the adapter: notes.txt" in capsys.readouterr().err
    (run / "adapter" / "notes.txt").unlink()
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "curves.png"}
    assert {path.name for path in out.iterdir()} == expected
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "other",
        "license_link": "LICENSE",
        "license_name": "tiny",
        "pipeline_tag": "text-generation",
        "tags": ["jlora", "lora"],
    }
    for told in (
        "# tiny-lora",
        f'"{BASE}"',
        "| training | train.jsonl |",
        "`lora.r` | `2`",
        "| loss |",
        "(curves.png)",
    ):
        assert told in card.text, told
    for file in ("README.md", "adapter_config.json"):
        for place in (run.parent, tmp_path, pathlib.Path(model_folder).parent):
            assert str(place) not in (out / file).read_text()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert peft.PeftModel.from_pretrained(model, out).peft_config["default"].r == 2


class FakeApi:
    """Stands in for `huggingface_hub.HfApi`, where jlora ends and the network begins."""

    asked: list[tuple[str, dict]]

    def create_repo(self, repo, **settings):
        self.asked.append(("create_repo", {"repo": repo} | settings))

    def create_branch(self, repo, **settings):
        self.asked.append(("create_branch", {"repo": repo} | settings))

    def upload_folder(self, *, folder_path, allow_patterns, **settings):
        files = [str(path.relative_to(folder_path)) for path in pathlib.Path(folder_path).rglob("*")]
        sent = sorted(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns))
        self.asked.append(("upload_folder", {"sent": sent} | settings))
        return huggingface_hub.CommitInfo("https://huggingface.co/owner/name/commit/1", "message", "", "1")


@pytest.fixture
def api(monkeypatch):
    """The calls of the Hub's API; there is a token."""
    FakeApi.asked = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return FakeApi.asked


def test_what_is_uploaded(run, tmp_path, api, capsys):
    """The folder that was looked at, or one that nobody sees; never a file that is no part of the result."""
    out, files = tmp_path / "out", ["README.md", "adapter_config.json", "adapter_model.safetensors", "curves.png"]
    assert main(["publish", f"--adapter={run / 'adapter'}", f"--base={BASE}", f"--out={out}"]) == 0
    assert api == []
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMore of it.\n")
    assert main(["publish", f"--out={out}", "--repo=owner/name", "--private", "--revision=v1"]) == 0
    assert [name for name, _ in api] == ["create_repo", "create_branch", "upload_folder"]
    assert api[0][1] == {"repo": "owner/name", "private": True, "exist_ok": True}
    assert api[1][1] == {"repo": "owner/name", "branch": "v1", "exist_ok": True}
    assert api[2][1]["sent"] == files and api[2][1]["revision"] == "v1"
    assert "uploaded: https://huggingface.co/owner/name/commit/1" in capsys.readouterr().out
    assert main(["publish", f"--adapter={run / 'adapter'}", f"--base={BASE}", f"--out={out}"]) == 2
    assert "README.md was changed since jlora wrote it, so it is left alone" in capsys.readouterr().err
    assert (out / "README.md").read_text().endswith("More of it.\n")
    (out / "train.jsonl").write_text("{}")
    assert main(["publish", f"--out={out}", "--repo=owner/name"]) == 2
    assert "these are no part of the adapter; remove:\n  train.jsonl" in capsys.readouterr().err
    assert main(["publish", f"--out={run / 'adapter'}", "--repo=owner/name"]) == 2
    assert len(api) == 3
    assert main(["publish", f"--adapter={run}", "--repo=owner/name"]) == 0
    assert api[-1][1]["sent"] == files and api[-1][1]["revision"] is None


def test_what_the_hub_refuses(run, tmp_path, api, monkeypatch, capsys):
    def refuses(self, repo, **settings):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no way out")

    monkeypatch.setattr(FakeApi, "create_repo", refuses)
    assert main(["publish", f"--adapter={run}", f"--out={tmp_path / 'out'}", "--repo=owner/name"]) == 1
    assert "owner/name: the Hub did not take" in capsys.readouterr().err
    assert publishing.result_files(tmp_path / "out", "adapter")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["publish", f"--adapter={run}", f"--out={tmp_path / 'other'}", "--repo=owner/name"]) == 2
    assert "log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_model(run, model_folder, tmp_path, capsys):
    """Of a base that nobody else has, and of a folder that transformers wrote."""
    merged, out = tmp_path / "merged", tmp_path / "out"
    assert main(["export", f"--workdir={run}", "--merged", "--unmeasured", f"--out={merged}"]) == 0
    assert main(["publish", f"--model={merged}", f"--workdir={run}", f"--out={out}"]) == 0
    assert (
        "which is not a name on the Hub, so the card names no base: --base=OWNER/NAME does" in capsys.readouterr().err
    )
    data = ModelCard.load(out / "README.md").data
    assert (data.library_name, data.license, data.get("base_model")) == ("transformers", "other", None)
    assert data.get("base_model_relation") is None and str(run.parent) not in (out / "README.md").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(out) and hub.load_tokenizer(out).chat_template
    assert main(["publish", f"--model={merged}", f"--out={out}"]) == 0  # its own card tells what no run does
    assert ModelCard.load(out / "README.md").data.tags == ["jlora", "lora"]
    assert "base: not known, so the card names no base" in capsys.readouterr().err
    assert main(["publish", f"--model={model_folder}", "--base=owner/base", f"--out={out}"]) == 0
    assert ModelCard.load(out / "README.md").data.base_model_relation == "finetune"


def test_mistakes(run, model_folder, tmp_path, api, capsys):
    begun, other, lost = (tmp_path / name for name in ("begun", "other", "lost"))
    shutil.copytree(run, begun, ignore=shutil.ignore_patterns("adapter"))
    other.mkdir()
    (other / "config.json").write_text("{}")
    shutil.copytree(run / "adapter", lost)
    (lost / "adapter_model.safetensors").unlink()
    out = f"--out={tmp_path / 'out'}"
    for options, message in [
        ([f"--workdir={begun}", out], "has not finished: there is no adapter/ in it yet"),
        ([f"--workdir={other}", out], "model.path: is required"),
        ([f"--workdir={tmp_path}", out], "is not the workdir of a run"),
        ([f"--adapter={tmp_path / 'nowhere'}", out], "is not a folder"),
        ([f"--adapter={lost}", out], "holds no adapter to publish: it has no adapter_model.safetensors"),
        ([f"--model={run / 'adapter'}", out], "holds no model to publish"),
        ([f"--adapter={run}", f"--out={model_folder}"], "so it is left alone"),
        ([f"--adapter={run}", f"--out={other}"], "so it is left alone"),
        ([f"--adapter={run}", f"--out={run / 'adapter'}"], "it is also the adapter"),
        ([f"--adapter={run}", "--repo=a/b/c"], "--repo=a/b/c: expected OWNER/NAME of the Hub"),
        ([f"--adapter={run}", "--repo=tiny"], "found no OWNER"),
        ([f"--adapter={run}", "--base=/m/x", out], "--base=/m/x: expected OWNER/NAME of the Hub"),
        ([f"--adapter={run}", "--license=GPL 3", out], "--license=GPL 3: expected an id of the Hub's"),
        ([f"--adapter={run}", f"--model={run}", out], "publish one of them"),
        ([f"--adapter={run}"], "--out and --repo: give one of them"),
        ([out], "give what to publish"),
        ([f"--adapter={run}", out, "--private"], "they need --repo"),
    ]:
        assert main(["publish", *options]) == 2, options
        assert message in capsys.readouterr().err, options
    assert not (tmp_path / "out").exists() and api == []
