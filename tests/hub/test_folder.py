"""Folders and files written whole, links among them."""

import pytest

from jlora.hub.folder import replacing, replacing_file


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
