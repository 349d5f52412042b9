"""The benchmark of encoding, tiny: every side runs, and jlora's gives the same batch from its cache."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import transformers

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_jloras_side_gives_one_batch_and_takes_it_from_its_cache_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import encoding

    encoding.train_tokenizer(tmp_path, "ab*.py")
    chats = [list(encoding.chats(9, 4, 3, 5)) for _ in range(2)]
    assert chats[0] == chats[1] and len(chats[0]) == 9
    assert all(3 <= len(message["content"].split()) <= 5 for chat in chats[0] for message in chat["messages"])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats[0]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    run = encoding.jlora(tmp_path / "a.jsonl", tokenizer, str(tmp_path / "cache"))
    first, second = run(), run()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert first["weights"].sum() > 9
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)


@pytest.mark.slow
def test_every_side_runs(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "encoding.py"), "--dry", "--records", "12", "--rounds", "1"]
    subprocess.run(
        [*command, "--out", str(tmp_path / "out.json")], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]["records"]["12"]
    assert set(figures) == {"file_MiB", "jlora", "TRL, one process", "TRL, two processes", "jlora, from its cache"}
