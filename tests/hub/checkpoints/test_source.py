"""Checkpoints are opened lazily and refused with one message that says everything that is wrong."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from jlora.errors import UserError
from jlora.hub.checkpoints.source import ALLOW, IGNORE, check_tensors, locate, open_source
from jlora.hub.checkpoints.weights import CHUNK, DTYPES, INDEX, SINGLE, TensorInfo, read_tensor


def test_tensors_equal_transformers(llama_folder):
    folder, model = llama_folder()
    source = open_source(folder)
    state = model.state_dict()
    assert set(source.tensors) == set(state)
    for name, info in source.tensors.items():
        assert info.shape == tuple(state[name].shape)
        np.testing.assert_array_equal(source.read(name), state[name].numpy())
    assert source.config["num_key_value_heads"] == 1
    assert source.generation_config["eos_token_id"] == 2


def test_shards_hold_the_same_tensors_as_one_file(llama_folder):
    whole, parts = open_source(llama_folder("one")[0]), open_source(llama_folder("many", max_shard_size="40KB")[0])
    assert len({info.file for info in parts.tensors.values()}) > 2
    assert set(whole.tensors) == set(parts.tensors)
    for name in whole.tensors:
        np.testing.assert_array_equal(whole.read(name), parts.read(name))


def test_bfloat16_is_read_as_bfloat16(llama_folder):
    folder, model = llama_folder()
    wanted = {name: value.numpy().astype(ml_dtypes.bfloat16) for name, value in model.state_dict().items()}
    save_file(wanted, folder / SINGLE)
    read = open_source(folder).read("model.norm.weight")
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read, wanted["model.norm.weight"])


def test_missing_config(llama_folder):
    folder, _ = llama_folder()
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*model\.safetensors"):
        open_source(folder)


def test_broken_config(llama_folder):
    folder, _ = llama_folder()
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        open_source(folder)


def test_missing_shards_are_all_named(llama_folder):
    folder, _ = llama_folder(max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[0].unlink()
    shards[2].unlink()
    with pytest.raises(FileNotFoundError, match=f"2 missing: {shards[0].name}, {shards[2].name}"):
        open_source(folder)


def test_truncated_files_are_all_named_with_sizes(llama_folder):
    folder, _ = llama_folder(max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    sizes = [shard.stat().st_size for shard in shards]
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    shards[1].write_bytes(shards[1].read_bytes()[:5])
    shards[2].write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError) as caught:
        open_source(folder)
    message = str(caught.value)
    assert f"{shards[0].name} is truncated or damaged: {sizes[0] - 10} bytes, expected {sizes[0]}" in message
    assert f"{shards[1].name} is truncated or not safetensors: 5 bytes" in message
    assert f"{shards[2].name} is truncated or not safetensors" in message


def test_damaged_headers(llama_folder):
    folder, _ = llama_folder()
    content = bytearray((folder / SINGLE).read_bytes())
    deep = b"[" * 100_000
    for damaged in (content[:8] + b"x" * 12 + content[20:], len(deep).to_bytes(8, "little") + deep):
        (folder / SINGLE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is not safetensors: its header cannot be read"):
            open_source(folder)


def test_only_pickles(llama_folder):
    folder, _ = llama_folder()
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only as pickles \(pytorch_model\.bin\)"):
        open_source(folder)


def test_no_weights(llama_folder):
    folder, _ = llama_folder()
    (folder / SINGLE).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {SINGLE}, {INDEX} or \.gguf"):
        open_source(folder)


def test_all_misfits_are_listed(llama_folder):
    folder, _ = llama_folder()
    tensors = load_file(folder / SINGLE)
    expected = {name: value.shape for name, value in tensors.items()}
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(20, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((80, 47), np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((80, 48), np.int8)
    tensors["model.rotary_emb.inv_freq"] = np.ones(10, np.float32)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(ValueError) as caught:
        check_tensors(open_source(folder).tensors, expected, harmless={"model.rotary_emb.inv_freq"})
    message = str(caught.value)
    assert "(4 tensors)" in message
    assert "missing model.norm.weight (48,)" in message
    assert "unknown model.layers.0.self_attn.q_norm.weight (20,)" in message
    assert "model.layers.1.mlp.up_proj.weight has shape (80, 47), expected (80, 48) (model.safetensors)" in message
    assert "model.layers.2.mlp.up_proj.weight is I8, expected one of BF16, F16, F32, F64" in message


def test_a_fitting_checkpoint_has_no_misfits(tmp_path):
    info = TensorInfo((2, 3), "F32", tmp_path / SINGLE)
    check_tensors({"a": info, "b": info}, {"a": (2, 3)}, harmless={"b"})


def test_one_tensor_in_two_files(llama_folder):
    folder, _ = llama_folder(max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shutil.copy(shards[0], shards[1])
    with pytest.raises(ValueError, match="is in both"):
        open_source(folder)


def test_a_folder_with_one_gguf_is_that_file(tmp_path):
    (tmp_path / "a.gguf").touch()
    assert locate(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"holds 2 GGUF files.*a\.gguf, b\.gguf"):
        locate(tmp_path)


def test_a_hub_id_without_a_connection():
    with pytest.raises(FileNotFoundError, match="no local folder 'nobody/nothing', and it could not be fetched"):
        locate("nobody/nothing")


def test_a_path_that_is_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        locate(tmp_path / "absent")
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"is a file that is not \.gguf"):
        locate(tmp_path / "model.bin")


def test_what_is_fetched_of_a_repository():
    wanted = [
        *("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt"),
        *("chat_template.jinja", "additional_chat_templates/rag.jinja"),
    ]
    others = [
        *("pytorch_model.bin", "consolidated.safetensors", "onnx/config.json", "original/model.safetensors"),
        *("a/config.json", "adapters/tokenizer.json", "additional_chat_templates2/x.json", "x/y/config.json"),
        *("additional_chat_templates/weights.safetensors.bin", "zadditional_chat_templates/x.json"),
    ]
    chosen = filter_repo_objects([*wanted, *others], allow_patterns=list(ALLOW), ignore_patterns=list(IGNORE))
    assert list(chosen) == wanted


def test_one_file_comes_before_an_index_that_was_left_over(llama_folder):
    old, _ = llama_folder("old", max_shard_size="40KB")
    new, _ = llama_folder("new", seed=1)
    shutil.copy(new / SINGLE, old / SINGLE)
    with pytest.warns(UserWarning, match=rf"{SINGLE} is read; {INDEX} and the files that it names are ignored"):
        found = open_source(old)
    assert {info.file.name for info in found.tensors.values()} == {SINGLE}
    state = transformers.LlamaForCausalLM.from_pretrained(old).state_dict()
    for name, value in state.items():
        np.testing.assert_array_equal(found.read(name), value.numpy(), err_msg=name)


@pytest.mark.parametrize("entry", ["../elsewhere.safetensors", "/etc/model.safetensors", "a" * 5000, 7, None])
def test_an_index_names_files_of_its_folder(llama_folder, entry):
    folder, _ = llama_folder(max_shard_size="40KB")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = entry
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="expected a file of this folder"):
        open_source(folder)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found_wherever_they_lie(dtype, value, tmp_path):
    size = CHUNK + 5
    for place in (0, CHUNK - 1, CHUNK, size - 1):
        values = np.linspace(-1, 1, size).astype(dtype)
        values[place] = value
        save_file({"a.weight": values, "b.weight": np.full(3, ml_dtypes.finfo(dtype).max, dtype)}, tmp_path / "x")
        with pytest.raises(UserError, match=r"a\.weight holds 1 of 32773 values that are NaN or infinite"):
            read_tensor(tmp_path / "x", "a.weight")
    assert read_tensor(tmp_path / "x", "b.weight").dtype == dtype


def test_integers_are_not_looked_at(tmp_path):
    save_file({"codes": np.full(9, 255, np.uint8)}, tmp_path / "x")
    assert read_tensor(tmp_path / "x", "codes").tolist() == [255] * 9
