"""A disk that is full in the middle of an export: one message, nothing half-written, what was there stays."""

import json
import subprocess
import sys

import pytest

from jlora import hub
from jlora.errors import NoSpaceError
from jlora.hub.checkpoints import folder

# Run with a limit on the size of a file, which the system enforces as it does a full disk.
SCRIPT = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
import jax
import jlora
from jlora import hub, lora
from jlora.cli.main import main
base, out = sys.argv[1:]
model, params = hub.load(base, dtype="float32")
adapted = lora.init(params, jlora.LoraConfig(r=8, init_lora_weights=False), jax.random.key(0))
hub.save_adapter(out + "/given", adapted)
_, packed = hub.load(base, quant="nf4")
recipe = {"merge_method": "linear", "models": [{"model": base, "parameters": {"weight": 1.0}}]}
writers = {
    "model": lambda path: hub.save_model(path, model, params, hub.load_tokenizer(base)),
    "adapter": lambda path: hub.save_adapter(path, adapted),
    "quantized": lambda path: hub.save_quantized(path, model, packed),
    "merged": lambda path: hub.merge_models(recipe, path),
    "model.gguf": lambda path: hub.save_gguf(path, model, params),
    "adapter.gguf": lambda path: hub.save_gguf_adapter(path, model, adapted),
}
found = {}
for limited in (False, True):
    if limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    for name, write in writers.items():
        try:
            write(out + "/" + name)
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
code = main(["merge", "--model=" + base, "--adapter=" + out + "/given", "--out=" + out + "/by-command"])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps({"code": code, **found}))
"""


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_nothing_is_left_of_what_had_no_room(llama_folder, byte_tokenizer, tmp_path):
    base = llama_folder(vocab_size=257)[0]
    byte_tokenizer.save_pretrained(base)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(base), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("code") == 1 and "by-command: not enough space" in done.stderr
    expected = {"model", "adapter", "quantized", "merged", "model.gguf", "adapter.gguf"}
    assert found.keys() == expected
    for name, (kind, message) in found.items():
        assert kind == "NoSpaceError", (name, message)
        assert str(tmp_path / name) in message and "what was there before is untouched" in message
    assert {path.name for path in tmp_path.iterdir()} == expected | {"given", "base"}
    for name in ("model", "quantized", "merged"):  # written before the limit, and whole
        hub.load(tmp_path / name)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("full (os error 28)")])
def test_a_full_disk_is_named_whoever_says_it(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with (
        pytest.raises(NoSpaceError, match="out: not enough space"),
        folder.replacing(tmp_path / "out", marker="config.json", stale=()) as fresh,
    ):
        (fresh / "new.txt").write_text("half")
        raise error
    assert contents(tmp_path) == {"out/config.json": b"old"}


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(PermissionError), folder.replacing_file(tmp_path / "a.gguf", magic=b"GGUF"):
        raise PermissionError(13, "no")
    assert contents(tmp_path) == {}
