"""Experiment trackers: each gets the numbers of metrics.jsonl, from a thread of its own that never holds up the run."""

import dataclasses
import json
import pathlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from jlora.train.algorithms.algorithm import Note, Numbers
from jlora.types import require

FILE = "trackers.json"
# How long the end of a run waits for what a tracker has not sent yet.
PATIENCE_SECONDS = 60.0
# What a tracker may raise: packages have errors of their own, and some end the process.
ERRORS = (Exception, SystemExit)

Ended = Literal["finished", "interrupted", "failed"]


@runtime_checkable
class Tracker(Protocol):
    """A run in an experiment tracker."""

    def log(self, step: int, numbers: Numbers) -> None:
        """Adds the numbers of a step."""

    def close(self, ended: Ended) -> None:
        """Says how the run ended, and sends what is left."""


@dataclasses.dataclass(frozen=True)
class About:
    """What a tracker is told of a run.

    Attributes:
        id: the same when the run is resumed.
        start: the step that the run resumes after.
        settings: by group.
    """

    workdir: pathlib.Path
    project: str
    name: str
    id: str
    start: int
    settings: Mapping[str, Any]


class TensorBoard:
    """Event files in the workdir's `tensorboard` folder."""

    def __init__(self, about: About) -> None:
        writer = require("tensorboardX", "tensorboard").SummaryWriter
        self._board = writer(str(about.workdir / "tensorboard"), purge_step=about.start + 1)

    def log(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def close(self, ended: Ended) -> None:
        self._board.close()


class WandB:
    """A run of Weights & Biases, with its files in the workdir; WANDB_MODE=offline keeps it there."""

    def __init__(self, about: About) -> None:
        named = {"project": about.project, "name": about.name, "id": about.id}
        settings = {"config": dict(about.settings), "dir": str(about.workdir), "resume": "allow"}
        self._run = require("wandb", "wandb").init(**named, **settings)
        # Steps of its own can only rise: after a resume it would drop those that come again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, ended: Ended) -> None:
        if ended == "interrupted":
            self._run.mark_preempting()
        self._run.finish(exit_code={"finished": 0, "interrupted": 75, "failed": 1}[ended])


class Trackio:
    """A run of trackio, in its folder on this machine, or where its variables say."""

    def __init__(self, about: About) -> None:
        # It knows runs by their names.
        name = f"{about.name}-{about.id}"
        settings = {"config": dict(about.settings), "resume": "allow", "embed": False}
        self._run = require("trackio", "trackio").init(project=about.project, name=name, **settings)

    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, ended: Ended) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in its store on this machine; the project is its experiment."""

    MOST = 100  # parameters of a request

    def __init__(self, about: About) -> None:
        mlflow = require("mlflow", "mlflow")
        self._entities = require("mlflow.entities", "mlflow")
        self._client = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(about.project)
        where = experiment.experiment_id if experiment else self._client.create_experiment(about.project)
        found = self._client.search_runs([where], f"tags.jlora_id = '{about.id}'", max_results=1)
        run = found[0] if found else self._client.create_run(where, run_name=about.name, tags={"jlora_id": about.id})
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        # A parameter that is known cannot be changed.
        new = {name: value for name, value in flat(about.settings).items() if name not in run.data.params}
        params = [self._entities.Param(name, str(value)[:500]) for name, value in new.items()]
        for first in range(0, len(params), self.MOST):
            self._client.log_batch(self._id, params=params[first : first + self.MOST])

    def log(self, step: int, numbers: Numbers) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, ended: Ended) -> None:
        status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[ended]
        self._client.set_terminated(self._id, status=status)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A tracker by name: how its run is opened, and the package that it needs, which is an extra of its name."""

    open: Callable[[About], Tracker]
    package: str


TRACKERS = {
    "tensorboard": Kind(TensorBoard, "tensorboardX"),
    "wandb": Kind(WandB, "wandb"),
    "trackio": Kind(Trackio, "trackio"),
    "mlflow": Kind(MLflow, "mlflow"),
}


class Sender:
    """A tracker behind a queue: whatever it does, the run goes on, and what fails is said once.

    Args:
        name: names it in messages.
        start: opens it.
    """

    def __init__(self, name: str, start: Callable[[], Tracker], note: Note) -> None:
        self._name, self._start, self._note = name, start, note
        self._queue: queue.SimpleQueue[tuple[int, Numbers] | Ended] = queue.SimpleQueue()
        self._left = False
        self._thread = threading.Thread(target=self._send, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, numbers: Numbers) -> None:
        """Has the numbers sent, unless the tracker has failed."""
        if self._thread.is_alive():
            self._queue.put((step, numbers))

    def close(self, ended: Ended) -> None:
        """Waits until everything is sent, but not for ever; closing twice is fine."""
        self._queue.put(ended)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            self._left = True
            self._note(f"{self._name} is still sending after {PATIENCE_SECONDS:.0f} s, and is left behind")

    def _send(self) -> None:
        try:
            tracker = self._start()
            while not isinstance(item := self._queue.get(), str):
                tracker.log(*item)
            tracker.close(item)
        except ERRORS as error:
            if not self._left:
                words = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
                self._note(f"{self._name} failed, and the run goes on without it: {words}")


def open_trackers(
    names: Sequence[str], workdir: pathlib.Path, settings: Mapping[str, Any], *, start: int, note: Note
) -> list[Tracker]:
    """The trackers of these names; a resumed run continues its run in each.

    Args:
        settings: of the run, as plain values; `train.project` and `train.run_name` name it.
        start: the step that the run resumes after; 0 for a new run.
    """
    if not names:
        return []
    path, train = workdir / FILE, settings["train"]
    if start and path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    else:
        name = train["run_name"] or workdir.absolute().name
        known = {"id": uuid.uuid4().hex[:8], "project": train["project"], "name": name}
        path.write_text(json.dumps(known) + "\n", encoding="utf-8")
    about = About(workdir, start=start, settings=settings, **known)
    return [Sender(name, lambda name=name: TRACKERS[name].open(about), note) for name in names]


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"optim": {"learning_rate": 1e-3}} → {"optim.learning_rate": 1e-3}."""
    found = {}
    for name, value in settings.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{path}{name}.") if inner else {f"{path}{name}": value}
    return found
