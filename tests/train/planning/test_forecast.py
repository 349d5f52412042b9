"""A forecast is of the very step that the run takes."""

import json
import pathlib
import shutil

import jax
import pytest

from jlora.train import loop, resume
from jlora.train.algorithms import ALGORITHMS
from jlora.train.config import resolve
from jlora.train.planning import forecast, topology

ROW = {"prompt": "1, 2", "completion": "3", "chosen": "3", "rejected": "4", "label": True}
ROWS = [{**ROW, "prompt": f"{i}, {i + 1}", "chosen": f"{i}{i}a", "label": i % 2 == 0} for i in range(8)]
KEYS = {
    "sft": ("prompt", "completion"),
    "dft": ("prompt", "completion"),
    "kto": ("prompt", "completion", "label"),
    "grpo": ("prompt",),
    "ppo": ("prompt",),
}


@pytest.fixture
def settings(model_folder, tmp_path):
    """(algorithm, groups of settings) → the settings of a run on a few records."""

    def make(algorithm, **groups):
        keys = KEYS.get(algorithm, ("prompt", "chosen", "rejected"))
        rows = [{key: row[key] for key in keys} for row in ROWS]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "algorithm": algorithm,
            "model": {"path": model_folder, "quant": "nf4"},
            "lora": {"r": 2, "target_modules": "all-linear"},
            "data": {"path": str(tmp_path / "train.jsonl")},
            "train": {"steps": 1, "batch_size": 2, "seq_len": 32},
        }
        if algorithm in ("grpo", "ppo"):
            (tmp_path / "rewards.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
            values["rollout"] = {
                "rewards": (f"{tmp_path / 'rewards.py'}:one",),
                "num_generations": 2,
                "max_completion_length": 8,
            }
        for group, own in groups.items():
            values[group] = {**values.get(group, {}), **own} if isinstance(own, dict) else own
        return resolve(values)

    return make


def described(tree):
    """Path → shape, dtype and how it is split."""
    return {
        jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype), str(getattr(leaf.sharding, "spec", None)))
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


CASES = {
    "sft": {},
    "dft": {},
    "dpo": {},
    "cpo": {},
    "orpo": {},
    "kto": {},
    "reward": {},
    "ppo": {},
    "dpo, the reference scored beforehand": {"dpo": {"precompute_ref_log_probs": True}},
    "grpo, with every number that a batch may bring": {
        "grpo": {"beta": 0.1, "num_iterations": 2, "loss_type": "dapo_prompt"}
    },
    "sft, accumulated on a mesh": {"train": {"grad_accum": 2}, "mesh": {"fsdp": 2}},
    "sft, all weights on a mesh": {
        "lora": None,
        "model": {"quant": None, "dtype": "bfloat16"},
        "mesh": {"fsdp": 2},
    },
    "dpo, all weights": {"lora": None, "model": {"quant": None}},
    "sft, moments of 8 bits on a mesh": {"optim": {"name": "adamw_8bit"}, "lora": {"r": 16}, "mesh": {"fsdp": 2}},
    "sft, two adapters": {"adapters": {"a": {"lora": {"r": 4}}, "b": {}}},
}


def slow_last(case):
    return pytest.param(case, marks=[pytest.mark.slow] if case.startswith(("ppo", "grpo")) or "8 bits" in case else [])


@pytest.mark.parametrize("case", [*map(slow_last, CASES)])
def test_state_frozen_weights_and_batch_are_those_of_the_run(settings, tmp_path, case, monkeypatch):
    here = jax.devices("cpu")[: 2 if "mesh" in CASES[case] else 1]
    monkeypatch.setattr(jax, "devices", lambda *_: here)
    (tmp_path / "run").mkdir()
    config = settings(case.partition(",")[0], **CASES[case])
    real = loop._prepare(config, tmp_path / "run", resume.read_begun(tmp_path / "run"), lambda message: None)
    batch, _, _ = real.job.source.next(real.state)
    program = forecast.trace(config, topology.parse(f"cpu:{len(here)}"))
    state, frozen, abstract = program.arguments
    assert described(state) == described(real.state)
    assert {path: what[:2] for path, what in described(frozen).items()} == {
        path: what[:2] for path, what in described(real.job.frozen).items()
    }
    assert abstract.keys() == batch.keys()
    for name, leaf in batch.items():
        assert abstract[name].dtype == leaf.dtype and len(abstract[name].shape) == leaf.ndim, name
        if leaf.ndim > 2:  # of short documents more have room, in arrays of a number each
            assert all(most >= found for most, found in zip(abstract[name].shape, leaf.shape, strict=True)), name


def test_the_optimizers_memory_is_told(settings):
    held = {}
    for name in ("adamw", "adamw_8bit"):
        program = forecast.trace(settings("sft", optim={"name": name}, lora={"r": 64}), topology.parse("cpu"))
        held[name] = program.sizes["optimizer"] / program.sizes["adapters"]
    assert held["adamw"] == pytest.approx(2, abs=1e-3) and held["adamw_8bit"] == pytest.approx(0.51, abs=0.02)


def test_config_json_alone_is_enough(settings, model_folder, tmp_path):
    folder = tmp_path / "described"
    folder.mkdir()
    shutil.copy(pathlib.Path(model_folder) / "config.json", folder)
    whole, alone = (
        forecast.trace(settings("sft", model={"path": str(path)}), topology.parse("cpu"))
        for path in (model_folder, folder)
    )
    assert described(whole.arguments) == described(alone.arguments)


def test_of_a_hub_id_only_the_configuration_is_fetched(settings, model_folder, monkeypatch):
    import huggingface_hub

    asked = []

    def fetched(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        return model_folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    forecast.trace(settings("sft", model={"path": "owner/name"}), topology.parse("cpu"))
    assert set(map(str, asked)) == {str(("owner/name", ["config.json", "generation_config.json"]))}


def test_a_described_model_that_is_packed_has_the_form_that_its_config_names(settings, model_folder, tmp_path):
    config = json.loads((pathlib.Path(model_folder) / "config.json").read_text())
    config["quantization_config"] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "quant_method": "bitsandbytes",
    }
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    asked, said = (
        forecast.trace(settings("sft", model=model), topology.parse("cpu"))
        for model in ({"path": model_folder, "quant": "nf4"}, {"path": str(folder), "quant": None})
    )
    assert described(asked.arguments) == described(said.arguments)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_compiles_for_a_card_that_is_not_here(settings, algorithm):
    card = topology.parse("h100")
    if not card.has_compiler:
        pytest.skip(f"needs jlora[{card.extra}]")
    found = forecast.forecast(settings(algorithm), card)
    assert not found.estimated and found.fits
    assert found.peak_bytes_per_device > found.argument_bytes
    estimate = forecast._temporaries(forecast.trace(settings(algorithm), card), card)
    assert 0.2 < estimate / (found.peak_bytes_per_device - found.argument_bytes) < 5
