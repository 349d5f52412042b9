"""Adapters trained side by side are what each is when it is trained alone."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jlora.train import Interrupted, resolve, run
from jlora.train.reporting.metrics import read_metrics
from jlora.train.restore import load_run

MEMBERS = {
    "sums": {"lora": {"r": 5, "target_modules": ["q_proj", "down_proj"]}, "optim": {"learning_rate": 3e-3}},
    "long": {"lora": {"r": 2, "use_rslora": True, "rank_pattern": {"v_proj": 4}}, "train": {"seed": 3}},
    "few": {
        "lora": dict(
            r=3,
            lora_alpha=5.0,
            init_lora_weights="pissa",
            layers_to_transform=[1],
            target_modules=["k_proj", "up_proj"],
        )
    },
}


def texts(name):
    return {
        "sums": [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(40)],
        "long": [{"prompt": f"say {i} ", "completion": "so " * (1 + i % 7)} for i in range(40)],
        "few": [{"prompt": "few ", "completion": f"words {i}"} for i in range(9)],
    }[name]


@pytest.fixture(scope="module")
def settings(small_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    members = {}
    for name, own in MEMBERS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in texts(name)))
        members[name] = own | {"data": {"path": str(path), "eval_path": str(path)}}
    return {
        "model": {"path": small_model_folder, "quant": "nf4"},
        "data": {
            "path": members["sums"]["data"]["path"],
            "eval_path": members["sums"]["data"]["path"],
            "packing": False,
            "bucket": 8,
        },
        "optim": {"learning_rate": 1e-3, "schedule": "linear", "max_grad_norm": 0.5},
        "train": {"steps": 3, "batch_size": 4, "seq_len": 32, "grad_accum": 2, "eval_every": 3},
        "adapters": members,
    }


def alone(settings, name):
    own = settings["adapters"][name]
    shared = {group: value for group, value in settings.items() if group != "adapters"}
    return shared | {group: shared.get(group, {}) | value for group, value in own.items()}


@pytest.fixture(scope="module")
def together(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("together")
    run(resolve(settings), workdir)
    return workdir


def same_adapter(found, expected, atol=1e-5):
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("name", MEMBERS)
def test_each_adapter_is_what_it_is_alone(settings, together, tmp_path, name):
    run(resolve(alone(settings, name)), tmp_path)
    same_adapter(together / "adapters" / name, tmp_path / "adapter")
    config = json.loads((together / "adapters" / name / "adapter_config.json").read_text())
    assert config["r"] == json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"]
    for mine, theirs in zip(read_metrics(together), read_metrics(tmp_path), strict=True):
        for number in ("loss", "grad_norm", "learning_rate", "mean_token_accuracy"):
            assert mine[f"{number}/{name}"] == pytest.approx(theirs[number], rel=1e-4), number
    assert mine["loss"] == pytest.approx(np.mean([mine[f"loss/{member}"] for member in MEMBERS]))
    assert mine[f"eval_loss/{name}"] == pytest.approx(theirs["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_on_a_mesh_and_after_a_pause_they_are_the_same(settings, together, tmp_path):
    config = resolve(settings | {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}})
    with pytest.raises(Interrupted):
        run(config, tmp_path, stop=lambda: True)
    with pytest.raises(ValueError, match=r"is a run of several adapters: give the folder of one"):
        load_run(tmp_path)
    run(config, tmp_path)
    for name in MEMBERS:
        same_adapter(tmp_path / "adapters" / name, together / "adapters" / name, atol=1e-4)


@pytest.fixture
def small(settings):
    """Two quick steps on an unpacked base, with adapters of other ranks, seeds and data."""
    paths = {name: settings["adapters"][name]["data"]["path"] for name in ("long", "sums")}
    return {
        "model": {"path": settings["model"]["path"]},
        "data": {"packing": False, "bucket": 32},
        "lora": {"target_modules": ["q_proj"]},
        "optim": {"learning_rate": 1e-2},
        "train": {"steps": 2, "batch_size": 2, "seq_len": 32},
        "adapters": {
            "long": {"data": {"path": paths["long"]}, "lora": {"r": 2}},
            "sums": {"data": {"path": paths["sums"]}, "lora": {"r": 3}, "train": {"seed": 1}},
        },
    }


def all_are_what_they_are_alone(settings, folder):
    run(resolve(settings), folder / "together")
    for name in settings["adapters"]:
        run(resolve(alone(settings, name)), folder / name)
        same_adapter(folder / "together" / "adapters" / name, folder / name / "adapter")


def test_a_pause_forgets_no_order(small, tmp_path):
    reordered = small | {"adapters": dict(reversed(small["adapters"].items()))}
    run(resolve(small), tmp_path / "at_once")
    with pytest.raises(Interrupted):
        run(resolve(reordered), tmp_path / "paused", stop=lambda: True)
    run(resolve(small), tmp_path / "paused")
    for name in small["adapters"]:
        same_adapter(tmp_path / "paused" / "adapters" / name, tmp_path / "at_once" / "adapters" / name)


def test_dropout_and_dora_are_what_they_are_alone(small, tmp_path):
    small["lora"] |= {"use_dora": True, "lora_dropout": 0.3}
    all_are_what_they_are_alone(small, tmp_path)


def test_adapters_of_experts_are_what_they_are_alone(small, tmp_path, byte_tokenizer):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=257,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        moe_intermediate_size=20,
        num_experts=3,
        num_experts_per_tok=2,
        bos_token_id=None,
        eos_token_id=0,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    small["model"]["path"] = str(tmp_path / "model")
    small["adapters"]["long"]["lora"]["target_parameters"] = ["mlp.experts.down_proj", "mlp.gate.weight"]
    all_are_what_they_are_alone(small, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": {"a": {"train": {"steps": 4}}}}, r"adapters\['a'\]: train.steps: is the same for all adapters"),
        ({"adapters": {"a": {"lora": {"rank": 4}}}}, r"adapters\['a'\]: lora.rank: unknown key; did you mean lora.r"),
        ({"adapters": {"../a": {}}}, r"found the name '../a', expected letters"),
        (
            {"adapters": {"a": {"data": "a.jsonl"}}},
            r"adapters\['a'\]: data: found 'a.jsonl', expected a group of settings",
        ),
        ({"algorithm": "dpo"}, "several are trained side by side by sft and dft; train those of dpo alone"),
        (
            {"adapters": {"a": {"lora": {"use_dora": True}}, "b": {}}},
            r"b: has no layers/self_attn/q_proj/lora_magnitude, which a trains: give all .* at the same modules",
        ),
    ],
)
def test_what_cannot_stand_side_by_side_is_said_before_training(settings, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(resolve(settings | change), tmp_path / "run")
    assert not (tmp_path / "run").exists()
