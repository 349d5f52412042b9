"""`jlora plan`: what it prints, of which algorithms, and what it refuses."""

import json
import re

import pytest

from jlora.cli.main import main
from jlora.train.algorithms import ALGORITHMS
from jlora.train.planning.topology import COMPILERS

ROLLOUT = [
    "--config.rollout.rewards=('nothing.py:one',)",
    "--config.rollout.num_generations=2",
    "--config.rollout.max_completion_length=8",
]


@pytest.fixture
def plan(recipe, capsys):
    """(options) → (exit code, what was printed, what was said of errors)."""

    def run(*options):
        code = main(["plan", f"--config={recipe}", "--config.data.path=not_there.jsonl", *options])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_compiler(monkeypatch):
    for platform in ("tpu", "cuda"):
        monkeypatch.setitem(COMPILERS, platform, (("a_package_that_is_not_there",), COMPILERS[platform][1]))


def test_a_compiled_step_as_json(plan):
    code, printed, _ = plan("--topology=cpu", "--json")
    found = json.loads(printed)
    assert code == 0
    assert found["estimated"] is False and found["compile_seconds"] > 0 and found["host_bytes"] == 0
    # r=2 on q and o (24 → 24), k and v (24 → 8), gate, up and down (24 and 40) of 2 layers
    assert found["trainable_parameters"] == 2 * 2 * (2 * 48 + 2 * 32 + 3 * 64)
    assert found["frozen_parameters"] > 257 * 24
    assert found["argument_bytes"] == sum(found["bytes_by_kind"].values())
    # The step's own memory has at least one layer's hidden units (40) of 2 rows of 32 tokens.
    assert found["peak_bytes_per_device"] - found["argument_bytes"] >= 2 * 32 * 40 * 4
    assert found["tokens"] == 2 * 32


def test_full_fine_tuning_is_planned_with_its_copies_and_moments(plan, no_compiler):
    options = ("--topology=h100x8", "--json", "--config.lora=None", "--config.mesh.fsdp=8")
    code, printed, said = plan(*options, "--config.model.dtype=bfloat16", "--config.train.batch_size=8")
    assert code == 0, said
    found = json.loads(printed)
    assert found["frozen_parameters"] == 0 and found["trainable_parameters"] > 257 * 24
    sizes = found["bytes_by_kind"]
    # Weights have 2 bytes, copies and two moments 4 each.
    assert sizes["optimizer"] == pytest.approx(6 * sizes["trained weights"], rel=0.01)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_planned_without_data_and_without_a_compiler(plan, no_compiler, algorithm):
    rollout = ROLLOUT if algorithm in ("grpo", "ppo") else []
    code, printed, said = plan("--topology=h100", "--json", f"--config.algorithm={algorithm}", *rollout)
    assert code == 0, said
    found = json.loads(printed)
    assert found["estimated"] is True and found["compile_seconds"] == 0
    assert found["peak_bytes_per_device"] > found["argument_bytes"]
    assert bool(found["cache_bytes_per_device"]) == (algorithm in ("grpo", "ppo"))
    assert found["fits"] is True and found["seconds_per_step"] > 0


def test_an_estimate_says_so_and_which_extra_brings_the_compiler(plan, no_compiler):
    code, printed, _ = plan(
        "--topology=v5e:2x4", "--config.mesh.fsdp=2", "--config.mesh.data=4", "--config.train.batch_size=8"
    )
    assert code == 0
    assert "on 8 × v5e (TPU v5e), estimated" in printed and "jlora[tpu]" in printed
    assert "of 15.75 GiB: fits" in printed


LLAMA_8B = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)


@pytest.fixture
def large(tmp_path):
    """A folder with the config.json of a model of 8 billion weights, and nothing else."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return f"--config.model.path={folder}"


def test_what_does_not_fit_comes_with_the_cheapest_change_that_does(plan, no_compiler, large):
    code, printed, said = plan("--topology=rtx4090", large, "--config.train.seq_len=1024")
    assert code == 0, said
    assert "of 22.47 GiB: fits" in printed  # 16-bit weights
    longer = ["--config.train.batch_size=1", "--config.train.seq_len=32768"]
    code, printed, _ = plan("--topology=rtx4090", large, *longer)
    assert "DOES NOT FIT" in printed
    assert "cheapest change that fits: --config.model.quant=nf4  (" in printed


def test_offloaded_activations_are_the_hosts_in_an_estimate_too(plan, no_compiler, large):
    options = ["--topology=h100", "--json", large, "--config.model.quant=nf4", "--config.train.seq_len=8192"]
    full, offload = (json.loads(plan(*options, f"--config.train.remat={name}")[1]) for name in ("full", "offload"))
    inputs = full["tokens"] * LLAMA_8B["hidden_size"] * LLAMA_8B["num_hidden_layers"] * 2  # bytes
    assert full["host_bytes"] == 0 and inputs <= offload["host_bytes"] < 1.1 * inputs
    gone = full["peak_bytes_per_device"] - offload["peak_bytes_per_device"]
    assert 0.9 * inputs < gone < 1.1 * inputs


def test_the_longest_rows(plan, no_compiler, large):
    code, printed, said = plan("--topology=h100", "--max_seq_len", "--json", large, "--config.model.quant=nf4")
    found = json.loads(printed)
    assert code == 0 and found["fits"]
    [flag] = found["suggestion"]["flags"]
    assert int(flag.removeprefix("--config.train.seq_len=")) > 2048
    assert found["peak_bytes_per_device"] > 0.9 * found["memory_bytes"]
    assert "does not fit" in said or said.count("GiB") > 2  # what was tried


def test_what_moves_on_a_mesh(plan):
    code, printed, _ = plan("--topology=cpu:2", "--json", "--config.mesh.data=2")
    found = json.loads(printed)
    assert code == 0 and found["devices"] == 2
    # At least the adapters' gradients, float32, once to and fro over a ring of two.
    assert found["received_bytes"]["all-reduce"] >= 4 * found["trainable_parameters"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology=h300"], r"found 'h300', expected one of v4, v5e, .*h100"),
        (["--topology=v5e:8"], r"found the shape '8', expected two sizes, as in 2x4"),
        (["--topology=v5p:2x2"], r"expected three sizes, as in 2x2x1"),
        (["--topology=h100:2x2"], r"expected a number of devices, as in h100x8"),
        (
            ["--topology=cpu:4", "--config.mesh.fsdp=3", "--config.train.batch_size=3"],
            r"number of devices is 4; try --config.mesh.sequence=4",
        ),
        (["--topology=cpu", "--config.model.dtype=int4"], r"model.dtype: found 'int4', expected one of float32"),
        (["--topology=cpu", "--config.model.path=not/there"], r"not/there"),
    ],
)
def test_mistakes_are_one_message(plan, options, message):
    code, printed, said = plan(*options)
    assert code == 2 and not printed
    assert re.search(message, said), said
