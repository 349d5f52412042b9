"""Folders and files written whole, links among them."""

import pytest

from jlora.hub.checkpoints.folder import refuse_inputs, replacing, replacing_file


def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path):
    real, link = tmp_path / "disk" / "model", tmp_path / "model"
    real.mkdir(parents=True)
    for name in ("config.json", "old.safetensors", "notes.txt"):
        (real / name).write_text("old")
    link.symlink_to(real)
    with replacing(link, marker="config.json", stale=("*.safetensors",)) as folder:
        (folder / "config.json").write_text("new")
    assert link.is_symlink() and link.resolve() == real
    assert {path.name: path.read_text() for path in real.iterdir()} == {"config.json": "new", "notes.txt": "old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "model"]
    assert [path.name for path in real.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_a_file(exists, tmp_path):
    real, link = tmp_path / "disk" / "model.gguf", tmp_path / "model.gguf"
    real.parent.mkdir()
    if exists:
        real.write_bytes(b"GGUF old")
    link.symlink_to(real)
    with replacing_file(link, magic=b"GGUF") as file:
        file.write_bytes(b"GGUF new")
    assert link.is_symlink() and real.read_bytes() == b"GGUF new"


def test_inputs_are_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "base.gguf").write_bytes(b"GGUF")
    (tmp_path / "link").symlink_to("model")
    refuse_inputs("out", {"--model": "model", "--base": None, "--adapter": "other"})
    refuse_inputs("some/hub-id", {"--model": "some/hub-id"})  # which is not here
    for out in ("model", tmp_path / "model", "other/../model", "link", "model/base.gguf"):
        with pytest.raises(ValueError, match="is also --model and --base; choose another place"):
            refuse_inputs(out, {"--model": "model", "--base": tmp_path / "link", "--adapter": "other"})
    (tmp_path / "model" / "model.safetensors").touch()  # which is the model then
    refuse_inputs("model/base.gguf", {"--model": "model"})


def test_files_are_as_readable_as_the_marker_and_folders_can_be_entered(tmp_path):
    with replacing(tmp_path / "model", marker="config.json", stale=()) as folder:
        (folder / "config.json").touch(0o644)
        (folder / "model.safetensors").touch(0o600)
        (folder / "templates").mkdir()
        (folder / "templates" / "tools.jinja").touch(0o644)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    expected = (tmp_path / "model" / "config.json").stat().st_mode & 0o777
    assert modes["model.safetensors"] == expected and not expected & 0o111
    assert modes["templates"] & 0o500 == 0o500
