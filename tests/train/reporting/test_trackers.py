"""Trackers: their own packages read what a run left, a resume goes on in it, and one that fails holds nothing up."""

import importlib
import json
import struct
import threading
import time

import pytest

from jlora.errors import UserError
from jlora.train import Interrupted, resolve, run
from jlora.train.reporting import trackers
from jlora.train.reporting.metrics import MetricsWriter, read_metrics
from jlora.train.reporting.trackers import Sender, flat, open_trackers


@pytest.fixture(scope="module")
def model_folder(make_llama):
    return make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture
def settings(model_folder, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} is ", "completion": f"{i}."}) + "\n" for i in range(20)))
    return {
        "model": {"path": model_folder},
        "data": {"path": str(path)},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "train": {"steps": 3, "batch_size": 2, "seq_len": 24, "project": "tests", "run_name": "mine"},
    }


def package(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'jlora[{name}]'")


@pytest.fixture
def wandb(monkeypatch):
    """read(workdir): (steps and losses, settings, run ids, exit codes) of the offline files, in order."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    package("wandb")

    def read(workdir):
        rows, config, ids, ends = [], {}, set(), []
        for path in sorted(workdir.glob("wandb/offline-run-*/run-*.wandb")):
            for record in wandb_records(path.read_bytes()):
                if record.HasField("history"):
                    items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                    rows.append((int(items["step"]), float(items["loss"])))
                elif record.HasField("run"):
                    assert (record.run.project, record.run.display_name) == ("tests", "mine")
                    config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                    ids.add(record.run.run_id)
                elif record.HasField("exit"):
                    ends.append(record.exit.exit_code)
        return rows, config, ids, ends

    return read


def wandb_records(data):
    """The records of an offline file: LevelDB's log of wandb's own messages."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    assert data[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too short for a header: the rest of a block is empty
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record = (b"" if kind in (1, 2) else record) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield messages.Record.FromString(record)


@pytest.fixture
def trackio(monkeypatch, tmp_path):
    """read(workdir): as `wandb`, through trackio's own storage."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    package("trackio")
    storage = importlib.import_module("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")

    def read(workdir):
        (name,) = storage.SQLiteStorage.get_runs("tests")
        rows = [(log["step"], log["loss"]) for log in storage.SQLiteStorage.get_logs("tests", name)]
        assert name.startswith("mine-")
        return rows, storage.SQLiteStorage.get_run_config("tests", name), {name.removeprefix("mine-")}, None

    return read


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    """read(workdir): as `wandb`, through MLflow's own client."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    found = package("mlflow")
    for needed in ("sqlalchemy", "alembic"):
        package(needed)
    found.set_tracking_uri(None)

    def read(workdir):
        client = found.MlflowClient()
        (one,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
        assert one.info.run_name == "mine"
        rows = sorted((metric.step, metric.value) for metric in client.get_metric_history(one.info.run_id, "loss"))
        params = {name: value for name, value in one.data.params.items() if name.startswith("optim.")}
        config = {"optim": {"learning_rate": float(params["optim.learning_rate"])}}
        return rows, config, {one.data.tags["jlora_id"]}, one.info.status

    return read


# SQLAlchemy of today warns of what MLflow asks of it.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_their_own_packages_read_an_interrupted_and_resumed_run(settings, tmp_path, wandb, trackio, mlflow):
    config = resolve(settings | {"train": settings["train"] | {"trackers": ["wandb", "trackio", "mlflow"]}})
    workdir = tmp_path / "run"
    asked = iter((False, True))
    with pytest.raises(Interrupted):
        run(config, workdir, stop=lambda: next(asked))
    assert [read(workdir)[3] for read in (wandb, trackio, mlflow)] == [[75], None, "KILLED"]
    run(config, workdir)
    run(config, workdir)  # finished already: nothing is added
    expected = [(record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in read_metrics(workdir)]
    for read, end in ((wandb, [75, 0]), (trackio, None), (mlflow, "FINISHED")):
        rows, told, ids, ended = read(workdir)
        assert rows == expected and [step for step, _ in rows] == [1, 2, 3]
        assert told["optim"]["learning_rate"] == 2e-4 and ended == end
        assert ids == {json.loads((workdir / "trackers.json").read_text())["id"]}


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
def test_a_server_that_cannot_be_reached_is_said_once_and_the_numbers_stay(tmp_path, monkeypatch, mlflow):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = []
    settings = {"train": {"project": "tests", "run_name": None}}
    opened = open_trackers(["mlflow"], tmp_path, settings, start=0, note=said.append)
    with MetricsWriter(tmp_path, trackers=opened) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 1.0})
    assert len(said) == 1 and said[0].startswith("mlflow failed, and the run goes on without it: MlflowException: ")
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


class Recorder:
    """A tracker that fails at a step."""

    def __init__(self, fails=None):
        self.fails, self.seen, self.ended = fails, [], None

    def log(self, step, numbers):
        if step == self.fails:
            raise SystemExit("the\nserver is gone")
        self.seen.append((step, numbers))

    def close(self, ended):
        self.ended = ended


def test_one_that_fails_on_the_way_is_said_once(tmp_path):
    said, good, bad = [], Recorder(), Recorder(fails=2)
    senders = [Sender(name, lambda one=one: one, said.append) for name, one in (("good", good), ("bad", bad))]
    with MetricsWriter(tmp_path, trackers=senders) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": 1.0 / step, "nothing": float("nan"), "word": "x"})
    assert said == ["bad failed, and the run goes on without it: SystemExit: the"]
    assert good.seen == [(step, {"loss": 1.0 / step}) for step in (1, 2, 3, 4)] and good.ended == "finished"
    assert bad.seen == [(1, {"loss": 1.0})] and bad.ended is None


def test_a_slow_one_holds_up_neither_the_steps_nor_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE_SECONDS", 0.1)
    said, let_go = [], threading.Event()
    sender = Sender("slow", lambda: let_go.wait(60) and Recorder(fails=1), said.append)
    began = time.monotonic()
    with pytest.raises(KeyError), MetricsWriter(tmp_path, trackers=[sender]) as writer:
        writer.write(1, {"loss": 1.0})
        raise KeyError
    assert time.monotonic() - began < 30 and said == ["slow is still sending after 0 s, and is left behind"]
    let_go.set()
    sender._thread.join(30)
    assert len(said) == 1


def test_settings_by_their_dotted_names():
    found = flat({"a": {"b": 1, "c": {"d": (1, 2)}, "e": {}}, "f": None})
    assert found == {"a.b": 1, "a.c.d": (1, 2), "a.e": {}, "f": None}


def test_the_old_setting_names_the_same_tracker(settings):
    train = settings["train"] | {"tensorboard": True, "trackers": ["wandb", "tensorboard"]}
    assert resolve(settings | {"train": train}).train.tracked == ("wandb", "tensorboard")
    with pytest.raises(UserError, match=r"train\.trackers\[0\]: found 'comet' .*one of 'tensorboard', 'wandb', 't"):
        resolve(settings | {"train": settings["train"] | {"trackers": ["comet"]}})
