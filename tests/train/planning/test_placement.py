"""A run's settings, model and devices are looked at together, once, and before anything is loaded."""

import json
import math
import pathlib

import pytest

from jlora import hub
from jlora.cli.main import main
from jlora.sharding import MeshConfig
from jlora.train.planning import placement
from jlora.train.reporting.metrics import read_metrics

WHOLE = "mesh.tensor=2 does not divide num_attention_heads 3, num_key_value_heads 1, vocab_size 257"
LLAMA = dict(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)
NARROW = dict(hidden_size=12, intermediate_size=20, head_dim=4)


@pytest.fixture(scope="module")
def model_folder(make_llama):
    return make_llama(**LLAMA)


@pytest.fixture
def command(model_folder, tmp_path, capsys):
    """(command, options) → (exit code, what was printed, what was said of errors), on the eight devices of tests."""
    records = [{"prompt": f"{i}", "completion": f"{i} and more"} for i in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values = {
        "model": {"path": model_folder},
        "data": {"path": str(tmp_path / "data.jsonl")},
        "train": {"steps": 2, "batch_size": 8, "seq_len": 32},
        "lora": {"r": 2},
    }
    (tmp_path / "run.json").write_text(json.dumps(values))

    def run(name, *options):
        where = {"train": f"--workdir={tmp_path / 'run'}", "plan": "--topology=cpu:8"}[name]
        code = main([name, f"--config={tmp_path / 'run.json'}", where, *options])
        return code, *capsys.readouterr()

    return run


MISTAKES = {
    "devices that cannot form the mesh, and all else that is wrong": (
        ["mesh.fsdp=3", "mesh.tensor=3", "model.attention=splash", "data.bucket=5", "mesh.sequence=5"],
        [
            "sizes multiply to 45, but the number of devices is 8; try --config.mesh.fsdp=8, or ",
            "train.batch_size is 8: not a multiple of mesh.data × mesh.fsdp = 3",
            "train.seq_len is 32: not a multiple of mesh.sequence = 5",
            "model.attention: the attention form 'splash' runs on a tpu, and this is a cpu",
        ],
    ),
    "the rest of the devices": (
        ["mesh.fsdp=-1", "train.batch_size=6"],
        ["train.batch_size is 6: not a multiple of mesh.data × mesh.fsdp = 8"],
    ),
    "a rest that is none": (
        ["mesh.fsdp=-1", "mesh.data=3"],
        ["the fixed sizes multiply to 3, which does not divide 8 devices; try --config.mesh.data=4 --config.mesh.fsdp"],
    ),
    "tokens, by the rest of the devices": (
        ["mesh.sequence=-1", "train.seq_len=36"],
        ["train.seq_len is 36: not a multiple of mesh.sequence = 8"],
    ),
    "rows whose lengths do not divide": (
        ["mesh.sequence=8", "data.bucket=12"],
        ["data.bucket is 12: row lengths are multiples of it, and it is not one of mesh.sequence = 8; set 24"],
    ),
    "an axis that splits nothing": (
        ["mesh.tensor=-1", "mesh.fsdp=1", "model.resize_vocab=259", "model.path={narrow}"],
        ["mesh.tensor=8 splits nothing of this model: heads × head_dim 12, intermediate_size 20, vocab_size 259"],
    ),
    "a form that cannot compute the rows": (
        ["mesh.sequence=8", "model.attention=splash_interpreted"],
        ["model.attention: the attention form 'splash_interpreted' cannot be used here: the queries are not the keys"],
    ),
    "a model that is not there, and a mesh": (
        ["model.path=not/there", "mesh.data=5"],
        [
            "not/there",
            "multiply to 5, but the number of devices is 8; try --config.mesh.data=4 --config.mesh.fsdp=2, or",
        ],
    ),
    "an unknown dtype": (["model.dtype=int4", "mesh.fsdp=8"], ["model.dtype: found 'int4', expected one of float32"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_train_and_plan_refuse_alike_and_at_once(command, model_folder, tmp_path, monkeypatch, case):
    def load(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(hub, "load", load)
    options, messages = MISTAKES[case]
    (tmp_path / "narrow").mkdir()
    sizes = json.loads((pathlib.Path(model_folder) / "config.json").read_text()) | NARROW
    (tmp_path / "narrow" / "config.json").write_text(json.dumps(sizes))
    options = [f"--config.{option.format(narrow=tmp_path / 'narrow')}" for option in options]
    found = [command(name, *options) for name in ("train", "plan")]
    assert found[0] == found[1]
    code, _, said = found[0]
    assert code == 2
    assert [message for message in messages if message not in said] == [], said
    assert not (tmp_path / "run").exists()


def test_an_unknown_topology_and_wrong_settings_are_one_message(command):
    code, _, said = command("plan", "--topology=h300", "--config.model.dtype=int4")
    assert code == 2
    assert "found 'h300'" in said and "model.dtype: found 'int4'" in said


def test_what_heads_do_not_divide_over_is_said(command):
    code, printed, _ = command("plan", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--topology=h100x8")
    assert code == 0 and WHOLE in printed
    code, printed, _ = command("plan", "--config.mesh.sequence=8", "--topology=h100x8")
    assert code == 0 and "mesh.tensor × mesh.sequence = 8 does not divide num_attention_heads 3" in printed


@pytest.mark.slow
def test_what_tensor_does_not_divide_is_whole_and_right(command, tmp_path):
    """Three heads and 257 tokens over two ways: the same losses as on one device."""
    assert command("train")[0] == 0
    alone = [record["loss"] for record in read_metrics(tmp_path / "run")]
    mesh = ["--config.mesh.fsdp=4", "--config.mesh.tensor=2"]
    code, _, said = command("train", *mesh, f"--workdir={tmp_path / 'spread'}")
    assert code == 0 and WHOLE in " ".join(said.split())
    assert [record["loss"] for record in read_metrics(tmp_path / "spread")] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "count", "found"),
    [
        (dict(fsdp=3), 4, "--config.mesh.fsdp=4"),
        (dict(tensor=2), 8, "--config.mesh.fsdp=4 --config.mesh.tensor=2"),
        (dict(tensor=3, data=2), 8, "--config.mesh.data=2 --config.mesh.tensor=4"),
        (dict(data=4, fsdp=4), 1, "--config.mesh.fsdp=1"),
        (dict(fsdp=-1, sequence=3), 16, "--config.mesh.fsdp=4 --config.mesh.sequence=4"),
    ],
)
def test_the_nearest_mesh(asked, count, found):
    first, *_ = placement.nearest(MeshConfig(**asked), count)
    assert placement.flags(first) == found


def test_proposed_meshes_work():
    def works(mesh):
        return 12 % (mesh.data * mesh.fsdp) == 0 and 4 % mesh.tensor == 0

    found = placement.nearest(MeshConfig(fsdp=8), 16, works)
    assert found and all(works(mesh) and math.prod(mesh.sizes) == 16 for mesh in found)
    assert placement.nearest(MeshConfig(fsdp=8), 16, lambda mesh: False) == []
