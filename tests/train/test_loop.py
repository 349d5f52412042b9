"""The loop: the same run on a mesh and without looking ahead, refused workdirs, faults that leave nothing behind."""

import dataclasses
import io
import itertools
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import checkpoint, hub, lora, tree
from jlora.errors import UserError
from jlora.train import Diverged, Interrupted, TrainConfig, finite, loop, resolve, resume, run
from jlora.train.algorithms.files import FileSource
from jlora.train.best import Best
from jlora.train.many import Sources
from jlora.train.reporting import tracing, usage
from jlora.train.reporting.log import Log
from jlora.train.reporting.metrics import MetricsWriter, read_metrics
from jlora.train.reporting.progress import Progress
from jlora.train.restore import load_run


@pytest.fixture(scope="module")
def settings(model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    texts = [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(40)]
    path.write_text("".join(json.dumps(record) + "\n" for record in texts))
    return {
        "model": {"path": model_folder, "quant": "nf4"},
        "data": {"path": str(path)},
        "lora": {"r": 4},
        "optim": {"learning_rate": 1e-3},
        "train": {"steps": 3, "batch_size": 4, "seq_len": 32, "grad_accum": 2},
    }


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    run(resolve(settings), workdir)
    return workdir


@pytest.mark.slow  # by default a step is compared (test_step.py), and a run of PPO (algorithms/test_alignment.py)
def test_the_same_command_on_a_mesh_gives_the_same_losses_and_adapter(settings, finished, tmp_path):
    run(resolve(settings | {"mesh": {"fsdp": 4, "tensor": 2}}), tmp_path)
    losses = [[record["loss"] for record in read_metrics(folder)] for folder in (finished, tmp_path)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, many = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (finished, tmp_path))
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_allclose(one[name], many[name], atol=1e-4)


@pytest.mark.parametrize(
    ("quant", "adapter"),
    [
        pytest.param(
            "int8",
            dict(use_dora=True, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
            | dict(modules_to_save=["norm"], trainable_token_indices=[0, 65], init_lora_weights="pissa"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "fp4",
            dict(target_modules=["embed_tokens", "v_proj"], use_rslora=True, rank_pattern={"v_proj": 2}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_kind_of_adapter_trains_on_a_mesh_as_on_one_device(settings, tmp_path, quant, adapter):
    changed = settings | {"model": settings["model"] | {"quant": quant}, "lora": {"r": 4} | adapter}
    run(resolve(changed), tmp_path / "one")
    run(resolve(changed | {"mesh": {"fsdp": 4, "tensor": 2}}), tmp_path / "many")
    losses = [[record["loss"] for record in read_metrics(tmp_path / name)] for name in ("one", "many")]
    assert losses[0][-1] != losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, many = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_allclose(one[name], many[name], atol=1e-4, err_msg=name)


def test_a_run_goes_on_and_is_exported_on_other_devices_than_it_began_on(settings, tmp_path):
    """What follows from the base is kept: computed on another mesh it would differ in its last bits."""
    adapter = dict(r=4, use_dora=True, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    train = settings["train"] | {"steps": 2, "batch_size": 8, "grad_accum": 1}
    changed = settings | {"model": {"path": settings["model"]["path"]}, "lora": adapter, "train": train}
    with pytest.raises(Interrupted):
        run(resolve(changed | {"mesh": {"data": 4, "fsdp": 2}}), tmp_path, stop=lambda: True)
    began = tree.flatten(checkpoint.newest_fixed(tmp_path / "checkpoints"))
    assert {"lora_start_a", "lora_base_norm", "lora_scale"} <= {path.split("/")[-1] for path in began}
    for mesh in (None, {"fsdp": 4, "tensor": 2}):
        if mesh:
            run(resolve(changed | {"mesh": mesh}), tmp_path)
        config, _, params = load_run(tmp_path)
        assert config.model.dtype == "float32"
        for path, leaf in tree.flatten(params).items():
            if path in began:
                np.testing.assert_array_equal(leaf, began[path], err_msg=path)
    hub.save_adapter(tmp_path / "exported", params, base=settings["model"]["path"])
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "exported"))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("what", ["data", "adapter"])
def test_a_run_does_not_go_on_with_what_was_changed_meanwhile(settings, tmp_path, what):
    """Its place in the data would be another, and what it is compared with too."""
    data = shutil.copy(settings["data"]["path"], tmp_path / "data.jsonl")
    _, params = hub.load(settings["model"]["path"])
    adapter = lora.init(params, lora.LoraConfig(r=2), jax.random.key(0))
    hub.save_adapter(tmp_path / "begun", adapter)
    changed = {group: value for group, value in settings.items() if group != "lora"} | {
        "data": {"path": str(data)},
        "model": {"path": settings["model"]["path"], "adapter": str(tmp_path / "begun")},
    }
    with pytest.raises(Interrupted):
        run(resolve(changed), tmp_path / "run", stop=lambda: True)
    if what == "data":
        lines = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "data.jsonl").write_text("".join(lines[::-1]))
    else:
        hub.save_adapter(tmp_path / "begun", lora.init(params, lora.LoraConfig(r=2), jax.random.key(1)))
    with pytest.raises(
        ValueError, match=f"belongs to another run.*\n  contents of {what if what == 'data' else 'model'}"
    ):
        run(resolve(changed), tmp_path / "run")


def test_a_run_keeps_the_dtype_that_it_began_in(settings, tmp_path):
    config = resolve(settings)
    assert resume.with_dtype(resume.Begun(tmp_path), config).model.dtype == "float32"
    begun = resume.Begun(tmp_path, 1, settings={"model": {"dtype": "bfloat16"}})
    assert resume.with_dtype(begun, config).model.dtype == "bfloat16"


def test_what_training_changed_is_seen_from_the_start(settings, tmp_path):
    path = settings["data"]["path"]
    watched = settings | {
        "data": {"path": path, "eval_path": path},
        "train": settings["train"] | {"eval_every": 3, "eval_on_start": True},
    }
    run(resolve(watched), tmp_path)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert records[0].keys() == {"step", "eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_tokens"}
    assert records[3]["eval_loss"] < records[0]["eval_loss"]
    run(resolve(watched), tmp_path)  # finished already: nothing is evaluated or lost
    assert read_metrics(tmp_path) == records


def test_a_workdir_of_another_run_is_refused(settings, finished):
    before = sorted(path.name for path in finished.iterdir())
    other = settings | {"optim": {"learning_rate": 5e-3}, "lora": {"r": 2}}
    with pytest.raises(ValueError) as error:
        run(resolve(other), finished)
    assert "optim.learning_rate: the run has 0.001, given 0.005" in str(error.value)
    assert "lora.r: the run has 4, given 2" in str(error.value)
    assert sorted(path.name for path in finished.iterdir()) == before


def test_a_run_replaces_no_adapter_of_another_program_and_says_so_before_it_trains(settings, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "adapter" / "README.md").write_text("# Theirs\\n")
    steps = resolve(settings | {"train": settings["train"] | {"steps": 4}})
    with pytest.raises(FileExistsError, match="left alone; move it away, or choose another --workdir"):
        run(steps, tmp_path / "run")
    assert read_metrics(tmp_path / "run") == read_metrics(finished)
    assert (tmp_path / "run" / "adapter" / "README.md").read_text() == "# Theirs\\n"
    shutil.rmtree(tmp_path / "run" / "adapter")
    run(steps, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"path": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"lora": {"target_modules": ["qqq_proj"]}}, "qqq_proj"),
        ({"train": {"steps": 1, "seq_len": 3}}, "no token to train on in 40 records"),
        ({"mesh": {"data": 3}, "train": {"steps": 1, "batch_size": 3}}, "the number of devices is 8"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing(settings, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(resolve(settings | change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Late(np.ndarray):
    """A number that is still on the device."""

    def __array__(self, dtype=None, copy=None):
        self.read()
        return np.array(self.view(np.ndarray))


def late(value, read=lambda: None):
    array = np.asarray(value).view(Late)
    array.read = read
    return array


@dataclasses.dataclass
class State:
    """What a fake step makes of the one before, which it deletes."""

    step: int
    finite: bool = True
    deleted: bool = False


class Fake(checkpoint.Checkpoints, MetricsWriter):
    """Source, step, checkpoints and metrics.jsonl, as a record of what the loop did with them. Batches are numbers,
    `spoiled` the steps that give NaN, and what is asked for the batch of step `fails` is a user's mistake.
    """

    def __init__(self, *, ahead, spoiled=(), fails=None, boundary=lambda position: True):
        self.ahead, self._spoiled, self._fails, self._boundary = ahead, spoiled, fails, boundary
        self.position = 0
        self.events, self.saved, self.written = [], {}, []

    @property
    def boundary(self):
        return self._boundary(self.position)

    def next(self, state):
        assert not state.deleted and state.step == self.position
        self.position += 1
        if self.position == self._fails:
            raise UserError("rows")
        return {"tokens": np.zeros((1, 1, self.position))}, 10, {}

    def observe(self, metrics):
        pass

    def get_state(self):
        return self.position

    def step(self, state, frozen, batch):
        number, state.deleted = state.step + 1, True
        assert number == batch["tokens"].shape[-1]
        self.events.append(("send", number))
        fine = number not in self._spoiled
        metrics = {name: late(float(number) if fine else np.nan) for name in ("loss", "grad_norm")}
        metrics["finite"] = late(fine, lambda: self.events.append(("read", number)))
        return State(number, fine), metrics

    def evaluate(self, state):
        assert not state.deleted and ("read", state.step) in self.events
        self.events.append(("evaluate", state.step))
        return {"step": float(state.step)}

    def save(self, number, state, data):
        assert number == state.step and not state.deleted and ("read", number) in self.events
        self.events.append(("save", number))
        self.saved[number] = dataclasses.replace(state), data

    def check(self):
        pass

    def kept(self):
        return sorted(self.saved)

    def write(self, number, metrics):
        numbers = {name: value for name, value in metrics.items() if name != "tokens_per_second"}
        self.written.append((number, json.dumps(numbers)))


def steps(fake, *, total=6, save_every=100, eval_every=0, log_every=1, policy="stop", stop=None, best=None):
    """How the loop ends with a fake."""
    train = types.SimpleNamespace(save_every=save_every, eval_every=eval_every, eval_on_start=False)
    watched = {"eval_every": 1, "best_metric": best, "greater_is_better": True} if best else {}
    this = loop._Run.__new__(loop._Run)
    this.config, this.workdir = types.SimpleNamespace(train=train), pathlib.Path("run")
    this.job = types.SimpleNamespace(source=fake, frozen=None, evaluate=fake.evaluate)
    this.total_steps, this.state, this.step, this.timed = total, State(0), fake.step, []
    this.read = lambda metrics, number: {"loss": float(metrics["loss"]), "number": number}
    this.guard = finite.Guard(policy, (), this.workdir, print)
    this.best = Best(TrainConfig(steps=1, **watched))
    log = Log(fake, None, log_every)
    asked = itertools.count(1)
    trace = tracing.Trace(this.workdir, 0, 0, total, print)
    try:
        loop._steps(this, 0, log, fake, trace, lambda: next(asked) == stop)
    except (UserError, Diverged, Interrupted) as error:
        return type(error), str(error)
    return json.dumps({name: value for name, value in log.last.items() if name != "tokens_per_second"})


def test_the_next_step_is_sent_before_the_last_one_is_read():
    fake = Fake(ahead=True)
    steps(fake, total=4)
    assert fake.events == [
        *(("send", 1), ("send", 2), ("read", 1), ("send", 3), ("read", 2), ("send", 4), ("read", 3), ("read", 4)),
        ("save", 4),
    ]


def test_nothing_is_sent_behind_a_step_whose_state_is_wanted():
    fake = Fake(ahead=True)
    steps(fake, total=6, save_every=2, eval_every=3)
    for kind in ("save", "evaluate"):
        for number in {step for name, step in fake.events if name == kind} - {6}:
            assert fake.events.index((kind, number)) < fake.events.index(("send", number + 1))


def test_the_best_step_is_looked_for_where_it_can_be_saved(monkeypatch):
    """Elsewhere, what the next checkpoint holds would be another step's."""
    monkeypatch.setattr(loop, "_tell_best", lambda this: None)
    for best, evaluated in ((None, [2, 4, 6, 8, 10]), ("eval_step", [3, 6, 9, 10])):
        fake = Fake(ahead=False, boundary=lambda position: position % 3 == 0)
        steps(fake, total=10, eval_every=2, best=best)
        assert [step for name, step in fake.events if name == "evaluate"] == evaluated
        assert sorted(fake.saved) == ([10] if best is None else evaluated)


def test_batches_that_follow_from_a_step_are_asked_for_after_it():
    fake = Fake(ahead=False)
    steps(fake, total=3)
    assert [name for name, _ in fake.events] == ["send", "read"] * 3 + ["save"]


@pytest.mark.parametrize("spoiled", [(), (1,), (2,), (3,), (4,), (2, 3), (4, 5), (6,)])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_whatever_happens_ends_as_without_looking_ahead(spoiled, policy, monkeypatch):
    monkeypatch.setattr(finite, "MOST_SKIPPED", 2)
    wishes = itertools.product((1, 3, 100), (0, 2), (1, 3), (None, 1, 2, 4), (None, 2, 4))
    for save_every, eval_every, log_every, stop, fails in wishes:
        fakes = [Fake(ahead=ahead, spoiled=spoiled, fails=fails) for ahead in (True, False)]
        options = dict(save_every=save_every, eval_every=eval_every, log_every=log_every, policy=policy, stop=stop)
        ends = [steps(fake, **options) for fake in fakes]
        assert ends[0] == ends[1], options
        assert fakes[0].saved == fakes[1].saved and fakes[0].written == fakes[1].written, options
        for number, (state, data) in fakes[0].saved.items():
            assert data["source"] == number and data["tokens"] == 10 * number
            assert state.finite or policy == "skip"


@pytest.mark.parametrize("kind", ["sft", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dpo", "several"))])
def test_real_runs_are_the_same_bit_for_bit_without_looking_ahead(settings, tmp_path, monkeypatch, kind):
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{i} plus {i} is ", "chosen": f"{2 * i}.", "rejected": f"{i}."} for i in range(1, 40)]
    path.write_text("".join(json.dumps(record) + "\n" for record in pairs))
    own = {
        "sft": {},
        "dpo": {"algorithm": "dpo", "data": {"path": str(path)}},
        "several": {"adapters": {name: {"train": {"seed": seed}} for seed, name in enumerate(("one", "other"))}},
    }[kind]
    adapter = {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.1}
    train = {"steps": 5, "batch_size": 2, "seq_len": 32, "save_every": 3}
    changed = {"model": settings["model"], "data": settings["data"], "lora": adapter, "train": train} | own
    ends = []
    for ahead in (True, False):
        for source in (FileSource, Sources):
            monkeypatch.setattr(source, "ahead", ahead)
        folder = tmp_path / str(ahead)
        last = run(resolve(changed), folder)
        records = [record | {"tokens_per_second": 0} for record in read_metrics(folder)]
        adapters = [file.read_bytes() for file in sorted(folder.rglob("adapter_model.safetensors"))]
        assert len(records) == 5 and len(adapters) == (2 if kind == "several" else 1)
        ends.append((records, adapters, last | {"tokens_per_second": 0}))
    assert ends[0] == ends[1]


def test_a_run_ends_with_what_it_used(settings, tmp_path, monkeypatch):
    """On a device whose peak is known, of one adapter and of several."""
    own = {"train": settings["train"] | {"steps": 4}, "model": {"path": settings["model"]["path"]}}
    monkeypatch.setattr(usage.devices, "known", lambda kind: types.SimpleNamespace(flops=1e12))
    for kind in ({}, {"adapters": {name: {"train": {"seed": seed}} for seed, name in enumerate(("one", "other"))}}):
        told, folder = io.StringIO(), tmp_path / f"run{len(kind)}"
        run(resolve(settings | own | kind), folder, progress=Progress(told))
        used = json.loads((folder / "usage.json").read_text())
        speeds = sorted(record["tokens_per_second"] for record in read_metrics(folder)[2:])
        assert used["tokens_per_second"] == pytest.approx(speeds[0]) and used["peak_bytes"] >= 0
        assert (used["steps"], used["devices"], used["device"]) == (2, 1, "cpu")
        parameters = 2 * 256 * 512 * 3 + 2 * 256 * (192 + 96) * 2 + 257 * 256
        least = 4 * parameters * speeds[0] / 1e12
        assert least < used["mfu"] < 1.3 * least
        assert f"MFU {used['mfu']:.1%} (median of 2 steps)" in told.getvalue()
    before = (folder / "usage.json").read_bytes()
    run(resolve(settings | own | kind), folder)  # finished already
    assert (folder / "usage.json").read_bytes() == before
