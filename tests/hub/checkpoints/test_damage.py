"""Damaged files: one message for each, never a traceback, nothing left behind, and no misfit is read as a fit."""

import contextlib
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jlora
from jlora import hub
from jlora.cli.main import main
from jlora.errors import UserError

VALUES = (
    *(None, True, False, -1, 0, 1, 3, 0.5, 1e9, 10**11, -(10**20), 2**64, float("nan"), float("inf")),
    *("", "x", "1", "a" * 5000, [], [1], ["a"], [None], [[1]], {}, {"a": 1}),
)
OTHER_DTYPES = (np.int32, np.bool_, np.uint8, np.int8, np.complex64)
SIZES = dict(vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, bos_token_id=None, eos_token_id=0)
WEIGHTS = {
    "model": "model.safetensors",
    "shards": "model-00001-of-*.safetensors",
    "adapter": "adapter_model.safetensors",
    "mlx": "adapters.safetensors",
    "gguf": "model.gguf",
}
KINDS = (*WEIGHTS, "packed", "tokenizer")


def damage(folder, rng):
    """What was done to one of the folder's files."""
    files = sorted(folder.iterdir())
    file = files[rng.integers(len(files))]
    kinds = [BYTES[rng.integers(len(BYTES))]]
    if file.suffix == ".json":
        kinds += [change_value] * 3
    if file.suffix == ".safetensors":
        kinds += [change_tensor]
    return f"{file.name}: {kinds[rng.integers(len(kinds))](file, rng)}"


# ---------------------------------------------------------------- damage to whatever is in a file


def flip(file, rng):
    data = bytearray(file.read_bytes())
    for _ in range(rng.integers(1, 6)):
        end = len(data) if rng.random() < 0.5 else min(len(data), 2000)  # headers are at the beginning
        data[rng.integers(end)] = rng.integers(256)
    file.write_bytes(data)
    return "bytes changed"


def cut(file, rng):
    data = file.read_bytes()
    size = int(rng.integers(len(data)))
    file.write_bytes(data[:size])
    return f"cut to {size} bytes"


def add(file, rng):
    file.write_bytes(file.read_bytes() + rng.bytes(int(rng.integers(1, 50))))
    return "bytes added"


def insert(file, rng):
    data = file.read_bytes()
    place = int(rng.integers(len(data)))
    file.write_bytes(data[:place] + rng.bytes(3) + data[place:])
    return f"bytes inserted at {place}"


def junk(file, rng):
    file.write_bytes(rng.bytes(int(rng.integers(300))))
    return "other bytes"


def delete(file, rng):
    file.unlink()
    return "deleted"


def nest(file, rng):
    file.write_text("[" * 100_000 + "]" * 100_000)
    return "brackets in brackets"


def replace_by_folder(file, rng):
    file.unlink()
    file.mkdir()
    return "a folder"


BYTES = (flip, flip, flip, cut, add, insert, junk, delete, nest, replace_by_folder)


# ---------------------------------------------------------------- damage to JSON


def change_value(file, rng):
    value = json.loads(file.read_text())
    places = list(_places(value))
    place, new = places[rng.integers(len(places))], VALUES[rng.integers(len(VALUES))]
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if rng.random() < 0.3:
        del holder[place[-1]]
        new = "(deleted)"
    else:
        holder[place[-1]] = new
    file.write_text(json.dumps(value))
    return f"{'/'.join(map(str, place))} = {str(new)[:30]}"


def _places(value, here=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:100]:
        yield (*here, key)
        yield from _places(item, (*here, key))


# ---------------------------------------------------------------- damage to tensors


def change_tensor(file, rng):
    kinds = list(TENSORS)
    return misfit(file, rng, kinds[rng.integers(len(kinds))])


def misfit(file, rng, kind):
    """One tensor of the file changed in its name, shape or type: nothing that can be read as if it had not been."""
    tensors = load_file(file)
    names = [name for name in sorted(tensors) if tensors[name].ndim == 2 and len(set(tensors[name].shape)) == 2]
    if not names:  # a shard of norms
        return cut(file, rng)
    name = names[rng.integers(len(names))]
    value = tensors.pop(name)
    tensors |= {new: np.ascontiguousarray(values) for new, values in TENSORS[kind](name, value, rng).items()}
    save_file(tensors, file)
    return f"{name}: {kind}"


TENSORS = {
    "removed": lambda name, value, rng: {},
    "renamed": lambda name, value, rng: {f"x.{name}": value},
    "one more": lambda name, value, rng: {name: value, f"x.{name}": value},
    "of one axis": lambda name, value, rng: {name: value.reshape(-1)},
    "of three axes": lambda name, value, rng: {name: value[None]},
    "transposed": lambda name, value, rng: {name: value.T},
    "empty": lambda name, value, rng: {name: value[:0]},
    "of another type": lambda name, value, rng: {name: value.astype(OTHER_DTYPES[rng.integers(len(OTHER_DTYPES))])},
    "not finite": lambda name, value, rng: {name: np.where(np.arange(value.shape[1]) == 1, np.nan, value)},
}


# ---------------------------------------------------------------- the folders, and what opens them


@pytest.fixture(scope="module")
def folders(tmp_path_factory, byte_tokenizer):
    """Kind → a whole folder of it; "params" → those of the model."""
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    base.save_pretrained(root / "model")
    base.save_pretrained(root / "shards", max_shard_size="70KB")
    byte_tokenizer.save_pretrained(root / "model")
    byte_tokenizer.save_pretrained(root / "tokenizer")
    model, params = hub.load(root / "model")
    config = jlora.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], use_dora=True)
    hub.save_adapter(root / "adapter", jlora.lora.init(params, config, jax.random.key(0)), base="model")
    (root / "gguf").mkdir()
    hub.save_gguf(root / "gguf" / "model.gguf", model, params, root / "model", dtype="q8_0")
    packed, packed_params = hub.load(root / "model", quant="nf4")
    hub.save_quantized(root / "packed", packed, packed_params, tokenizer=byte_tokenizer)
    _save_mlx(root / "mlx")
    return {kind: root / kind for kind in KINDS} | {"params": params}


def _save_mlx(folder):
    folder.mkdir()
    shapes = {"lora_a": (64, 4), "lora_b": (4, 64)}
    names = {f"model.layers.{i}.self_attn.q_proj.{leaf}": shape for i in range(2) for leaf, shape in shapes.items()}
    save_file({name: np.ones(shape, np.float32) for name, shape in names.items()}, folder / "adapters.safetensors")
    parameters = dict(rank=4, scale=2.0, dropout=0.0, keys=["self_attn.q_proj"])
    config = dict(fine_tune_type="lora", num_layers=2, lora_parameters=parameters)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def open_folder(kind, folder, params):
    """Everything in the folder opened as its kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in ("adapter", "mlx"):
            hub.load_adapter(params, folder)
        elif kind != "tokenizer":
            hub.load(folder)
        if kind in ("tokenizer", "packed", "gguf"):
            hub.load_tokenizer(folder)


def weights(folder, kind):
    return next(folder.glob(WEIGHTS[kind]))


def damaged(whole, folder, rng, change=damage):
    """What was done to a copy at `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    return change(folder, rng)


def check_random_damage(kind, seeds, folders, tmp_path):
    refused = 0
    for seed in seeds:
        what = damaged(folders[kind], tmp_path / kind, np.random.default_rng(seed))
        try:
            open_folder(kind, tmp_path / kind, folders["params"])
        except UserError as error:
            refused += 1
            assert len(str(error)) < 20_000, (kind, seed, what)
        except BaseException as error:
            raise AssertionError(f"{kind}, seed {seed}: {what}") from error
    assert refused


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_one_message_or_nothing(kind, folders, tmp_path):
    check_random_damage(kind, range(10), folders, tmp_path)


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("kind", KINDS)
def test_more_random_damage_is_one_message_or_nothing(kind, folders, tmp_path):
    check_random_damage(kind, range(1000, 2000), folders, tmp_path)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_cut_are_refused(kind, folders, tmp_path):
    for seed in range(6):
        what = damaged(
            folders[kind],
            tmp_path / kind,
            np.random.default_rng(seed),
            lambda folder, rng: cut(weights(folder, kind), rng),
        )
        with pytest.raises(UserError):
            open_folder(kind, tmp_path / kind, folders["params"])
            pytest.fail(f"opened: {what}")


@pytest.mark.parametrize("fault", TENSORS)
@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if kind != "gguf"])
def test_a_misfit_among_the_tensors_is_refused_by_name(kind, fault, folders, tmp_path):
    what = damaged(
        folders[kind],
        tmp_path / kind,
        np.random.default_rng(0),
        lambda folder, rng: misfit(weights(folder, kind), rng, fault),
    )
    with pytest.raises(UserError) as caught:
        open_folder(kind, tmp_path / kind, folders["params"])
        pytest.fail(f"opened: {what}")
    assert what.partition(":")[0] in str(caught.value)


COMMANDS = {
    "generate": lambda model, adapter, _: [
        *("generate", f"--model={model}", f"--adapter={adapter}", "--prompt=a", "--max_new_tokens=1")
    ],
    "merge": lambda model, adapter, out: ["merge", f"--model={model}", f"--adapter={adapter}", f"--out={out}"],
    "quantize": lambda model, _, out: ["quantize", f"--model={model}", "--quant=nf4", f"--out={out}"],
}
# Where a value that is not finite is put: the file, and by which argument of the commands it is read.
NAN = {"model": ("model", ("generate", "merge", "quantize")), "adapter": ("adapter", ("generate", "merge"))}


def run(command, folders, out):
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        return main(COMMANDS[command](folders["model"], folders["adapter"], out / "made"))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_one_message_and_leave_nothing_behind(command, folders, tmp_path, capsys):
    kinds = ("model", "adapter") if command != "quantize" else ("model",)
    for seed in range(4):
        kind = kinds[seed % len(kinds)]
        rng = np.random.default_rng(100 + seed)
        what = damaged(folders[kind], tmp_path / "damaged", rng)
        out = tmp_path / f"out{seed}"
        out.mkdir()
        code = run(command, folders | {kind: tmp_path / "damaged"}, out)
        assert code in (0, 2), what
        if code:
            assert not list(out.iterdir()), what
            assert capsys.readouterr().err.count("jlora: ") == 1, what


@pytest.mark.parametrize(("kind", "command"), [(kind, command) for kind, (_, all_) in NAN.items() for command in all_])
def test_no_command_takes_values_that_are_not_finite(kind, command, folders, tmp_path, capsys):
    damaged(
        folders[kind],
        tmp_path / "damaged",
        np.random.default_rng(0),
        lambda folder, rng: misfit(weights(folder, kind), rng, "not finite"),
    )
    (tmp_path / "out").mkdir()
    assert run(command, folders | {kind: tmp_path / "damaged"}, tmp_path / "out") == 2
    assert "that are NaN or infinite" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
