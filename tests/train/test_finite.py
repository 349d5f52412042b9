"""A run whose numbers are no longer finite stops with what it has, or leaves the step out; others beside it go on."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import hub, lora, sharding
from jlora.cli.main import main
from jlora.optim import OptimConfig, make_optimizer
from jlora.train import Diverged, finite, resolve, run
from jlora.train.algorithms.sft import sft_loss
from jlora.train.reporting.metrics import read_metrics
from jlora.train.reporting.progress import Progress
from jlora.train.state import create_state
from jlora.train.step import make_step


@pytest.fixture(scope="module")
def model_folder(make_llama):
    return make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture(scope="module")
def settings(model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    texts = [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(40)]
    path.write_text("".join(json.dumps(record) + "\n" for record in texts))
    return {
        "model": {"path": model_folder},
        "data": {"path": str(path)},
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "optim": {"learning_rate": 1e-3, "schedule": "constant"},
        "train": {"steps": 6, "batch_size": 2, "seq_len": 24, "save_every": 1, "keep_checkpoints": 1},
    }


@pytest.fixture
def spikes(monkeypatch):
    """spikes(steps, places): the batches of these steps hold weights of NaN, of these adapters if there are several."""

    def plant(steps, places=()):
        put = sharding.put_batch
        count = iter(range(1, 1000))

        def spiked(batch, mesh):
            if next(count) in steps:
                weights = np.array(batch["weights"], np.float32)
                if places:
                    weights[:, list(places)] = np.nan
                else:
                    weights[...] = np.nan
                batch = {**batch, "weights": weights}
            return put(batch, mesh)

        monkeypatch.setattr(sharding, "put_batch", spiked)

    return plant


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_the_run_stops_and_its_last_finite_checkpoint_is_kept_and_named(settings, tmp_path, spikes):
    spikes({4})
    with pytest.raises(Diverged) as error:
        run(resolve(settings), tmp_path)
    message = str(error.value)
    assert "stopped: the loss is nan at step 4" in message
    assert f"step 3; `jlora export --workdir={tmp_path} --step=3 --out=DIR`" in message
    assert "optim.learning_rate" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert not (tmp_path / "adapter").exists()
    assert [record["loss"] is None for record in read_metrics(tmp_path)] == [False, False, False, True]
    assert main(["export", f"--workdir={tmp_path}", "--step=3", f"--out={tmp_path}/out"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in adapter(tmp_path / "out").values())


def test_from_the_command_line_it_is_a_message_and_exit_1(settings, tmp_path, spikes, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"def get_config():\n    return {settings!r}\n".replace(
            "return {", "from ml_collections import ConfigDict\n    return ConfigDict({"
        ).replace("}}\n", "}})\n")
    )
    spikes({1})
    assert main(["train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err
    assert "jlora: stopped: the loss is nan at step 1" in said and "nothing was saved before it" in said
    assert "Traceback" not in said


def test_a_skipped_step_changes_nothing_but_the_count_and_the_schedule(settings, tmp_path, spikes):
    spikes({3})
    train = settings["train"] | {"on_nonfinite": "skip", "steps": 4, "save_every": 2, "keep_checkpoints": 9}
    changed = settings | {"train": train, "optim": {"learning_rate": 1e-3, "schedule": "linear"}}
    run(resolve(changed), tmp_path)
    records = read_metrics(tmp_path)
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1]
    assert [record["learning_rate"] for record in records] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert records[3]["loss"] is not None
    assert all(np.isfinite(leaf).all() for leaf in adapter(tmp_path / "adapter").values())


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_is_not_finite_leaves_the_state_as_it_was_if_asked(model_folder, skip):
    mesh = sharding.make_mesh(sharding.MeshConfig())
    model, params = hub.load(model_folder, mesh=mesh)
    frozen, trainable = lora.split(lora.init(params, lora.LoraConfig(r=2), jax.random.key(1)))
    optimizer = make_optimizer(OptimConfig(schedule="linear", warmup_steps=1), 10)
    state = create_state(trainable, optimizer, 0, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    steps = {kind: make_step(sft_loss(model), optimizer, places, skip=kind) for kind in (False, True)}
    row = np.arange(12, dtype=np.int32)[None, None] + 1
    batch = dict(
        tokens=row, targets=row + 1, positions=row - 1, segment_ids=row * 0 + 1, weights=row * 0 + np.float32(1)
    )
    first, metrics = steps[skip](jax.tree.map(jnp.copy, state), frozen, batch)
    other, _ = steps[not skip](jax.tree.map(jnp.copy, state), frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, first, other)  # the flag changes no bit of a step that is finite
    assert metrics["finite"]
    before = jax.tree.map(np.array, first)
    after, metrics = steps[skip](first, frozen, batch | {"weights": batch["weights"] * np.nan})
    assert not metrics["finite"] and after.step == 2
    if skip:
        jax.tree.map(np.testing.assert_array_equal, after.trainable, before.trainable)
        counts = [int(leaf) for leaf in jax.tree.leaves(after.moments) if leaf.ndim == 0]
        assert sorted(counts) == [1, 1, 2, 2]  # Adam's stay, the schedules' go on
    else:
        assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.trainable))


def test_skipping_ends_after_many_in_a_row(settings, tmp_path, spikes, monkeypatch):
    monkeypatch.setattr(finite, "MOST_SKIPPED", 3)
    spikes({2, 4, 5, 6})
    with pytest.raises(Diverged, match="at step 6, the last of 3 steps in a row that were skipped"):
        run(resolve(settings | {"train": settings["train"] | {"on_nonfinite": "skip"}}), tmp_path)


def test_adapters_beside_one_that_diverged_go_on_as_if_alone(settings, tmp_path, spikes):
    path = settings["data"]["path"]
    own = {"bad": {"data": {"path": path}}, "good": {"data": {"path": path}, "train": {"seed": 3}}}
    changed = settings | {"adapters": own, "train": settings["train"] | {"steps": 4, "keep_checkpoints": 9}}
    run(resolve(changed), tmp_path / "well")
    spikes({3}, [0])
    told = io.StringIO()
    run(resolve(changed), tmp_path / "run", progress=Progress(told))
    assert [line for line in told.getvalue().splitlines() if line.startswith("bad: the")] == [
        "bad: the loss is nan at step 3; the others continue, and its adapter stays as it was after step 2"
    ]
    kept, well = ({name: adapter(tmp_path / run / "adapters" / name) for name in own} for run in ("run", "well"))
    for name, leaf in well["good"].items():
        np.testing.assert_array_equal(kept["good"][name], leaf)
    run(resolve(changed | {"train": changed["train"] | {"steps": 2}, "optim": settings["optim"]}), tmp_path / "short")
    for name, leaf in adapter(tmp_path / "short" / "adapters" / "bad").items():
        np.testing.assert_array_equal(kept["bad"][name], leaf)
    records = read_metrics(tmp_path / "run")
    assert [record["loss/bad"] is None for record in records] == [False, False, True, False]
    assert all(record["loss"] is not None for record in records)


@pytest.mark.parametrize(
    ("loss", "policy", "kept", "words"),
    [
        (np.nan, "stop", [2, 3], ["gave a finite loss is that of step 2", "of step 3 holds the weights that give"]),
        (np.nan, "stop", [3], ["holds finite numbers is that of step 3", "keep_checkpoints of 2 or more"]),
        (np.nan, "stop", [1, 2], ["holds finite numbers is that of step 2"]),
        (1.0, "stop", [2, 3], ["the adapter or its moments are not finite", "finite numbers is that of step 3"]),
        (np.nan, "stop", [], ["nothing was saved before it"]),
    ],
)
def test_the_checkpoint_at_whose_weights_the_loss_failed_is_doubted(tmp_path, loss, policy, kept, words):
    guard = finite.Guard(policy, (), tmp_path, print)
    guard.see({"finite": np.array(False), "loss": np.array(loss), "grad_norm": np.array(1.0)}, 4)
    message = str(guard.error(kept))
    assert all(part in message for part in words), message
    assert ("they are spoiled" in message) == (np.isnan(loss) and kept[-1:] == [3])
    assert "on_nonfinite=skip" in message


def test_several_adapters_hear_what_is_true_of_them(tmp_path):
    bad = {"finite": np.array([False, True]), "loss": np.array([np.nan, 1]), "grad_norm": np.ones(2)}
    said = []
    guard = finite.Guard("skip", ("a", "b"), tmp_path, said.append)
    for step in range(1, finite.MOST_SKIPPED + 1):
        guard.see(bad, step)
    assert len(said) == 1 and "as it was after step 0 until a step of its own is finite again" in said[0]
    guard = finite.Guard("stop", ("a", "b"), tmp_path, said.append)
    guard.see(bad | {"finite": np.zeros(2, bool)}, 4)
    assert "on_nonfinite=skip" not in str(guard.error([3]))
