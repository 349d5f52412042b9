"""The training loop: mesh, data, model, state, restore, steps, adapter. All the maths is in the step."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import jax

from jlora import checkpoint, data, hub, lora, quant, sharding, tree
from jlora.errors import UserError, number_of, size_of
from jlora.train import resume
from jlora.train.adapt import adapt, based
from jlora.train.algorithms import ALGORITHMS
from jlora.train.algorithms.algorithm import Base, Job, Note, Numbers
from jlora.train.algorithms.rollout import FILE as COMPLETIONS
from jlora.train.best import FILE as BEST
from jlora.train.best import Best
from jlora.train.config import RunConfig, to_dict
from jlora.train.early import check_surroundings
from jlora.train.finite import Guard
from jlora.train.learning import learn
from jlora.train.prepared import run_plan, run_tokenizer
from jlora.train.reporting import tracing, usage
from jlora.train.reporting.log import Log
from jlora.train.reporting.metrics import MetricsWriter, truncate
from jlora.train.reporting.progress import Progress
from jlora.train.reporting.trackers import open_trackers
from jlora.train.results import require_room, save_results, tell_usage, write_json
from jlora.train.state import TrainState
from jlora.train.step import Metrics, Step


class Interrupted(Exception):
    """The run was asked to stop and has saved everything; running it again continues from there."""


def run(
    config: RunConfig,
    workdir: str | os.PathLike,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Trains, writes the run's files to `workdir`, and returns the last step's metrics.

    The files are config.json, metrics.jsonl, curves.png, checkpoints/ and adapter/ (with lora=None, model/). If the
    workdir has checkpoints, the run resumes from the newest one and computes what it would have computed without the
    pause.

    Args:
        progress: is told about every step.
        stop: called once per step; once it returns True, that step is finished (with several hosts, the next one),
            everything is saved and `Interrupted` is raised.

    Raises:
        ValueError: the workdir belongs to a run with different settings, different data or another version of jlora, or
            the data, model or targets are invalid.
        Diverged: numbers are no longer finite or the loss explodes, and nothing is left to train.
        Interrupted: see `stop`.
    """
    folder, before = pathlib.Path(workdir), usage.process_peak()
    begun = resume.read_begun(folder)
    config = resume.with_dtype(begun, config)
    resume.refuse_other_settings(begun, config)
    left_out = data.LeftOut()
    say = progress.note if progress else lambda message: None
    this = _prepare(config, folder, begun, data.Notes(say, say, left_out, progress.counting if progress else None))
    if left_out:
        say(left_out.describe())
    this.left_out = left_out
    with closing(_checkpoints(this)) as saved:
        start = _restore(this, saved)
        profile = tracing.Trace(folder, config.train.profile, start, this.total_steps, this.note)
        with _log(this, start, progress) as log, profile as trace:
            _steps(this, start, log, saved, trace, stop)
        if this.best.ended and int(this.state.step) < this.total_steps:
            this.note(
                f"ended after step {this.state.step} of {this.total_steps}: "
                f"{number_of(this.best.waited, 'evaluation')} in a row without a better one than the best "
                f"({this.best}); a higher train.patience continues"
            )
        state = _result(this, saved)
    reads_once = ALGORITHMS[config.algorithm].reads_once
    tell_usage(
        folder,
        this.base,
        this.job,
        state,
        this.timed,
        this.note,
        before=before,
        trains=config.trains,
        flops=reads_once,
    )
    save_results(folder, config, this.base, this.job, state, this.note)
    return log.last


@dataclasses.dataclass
class _Run:
    """What the loop holds while it runs."""

    config: RunConfig
    workdir: pathlib.Path
    base: Base
    job: Job
    total_steps: int
    state: TrainState
    step: Step
    read: Callable[[Metrics, int], Numbers]
    note: Note
    guard: Guard
    best: Best
    manifest: dict[str, Any]
    left_out: data.LeftOut = dataclasses.field(default_factory=data.LeftOut)
    # Tokens read by the finished steps, and when the last of them finished.
    tokens: int = 0
    finished: float = 0.0
    # Tokens, seconds and row length of each step since the start.
    timed: list[tuple[int, float, int]] = dataclasses.field(default_factory=list)


def _prepare(config: RunConfig, folder: pathlib.Path, begun: resume.Begun, note: Note) -> _Run:
    """Everything up to the first step; user mistakes are found before anything is written.

    Args:
        begun: the run that the workdir holds.
    """
    mesh = _mesh(config, folder, note)
    described = hub.read_model(config.model.path, config.model.resize_vocab).config
    date = begun.date
    tokenizer = run_tokenizer(config, described.vocab_size, date)
    plan = run_plan(config, tokenizer, begun.fixed, note)
    described.warn_beyond(plan.longest, f"the texts of {config.data.train}")
    manifest = resume.manifest(config, tokenizer, plan, date)
    resume.refuse_other_files(begun, manifest, note if config.train.on_changed_files == "note" else None)
    resume.refuse_fewer_steps(begun, plan.total_steps, note)
    base = _base(config, mesh, tokenizer, begun, folder)
    note(_describe_params(config, base))
    job = plan.start(base)
    learning = (job.learn or learn)(config, base, job, plan.total_steps)
    require_room(folder, config, job, learning.state)
    return _Run(
        config=config,
        workdir=folder,
        base=base,
        job=job,
        total_steps=plan.total_steps,
        state=learning.state,
        step=learning.step,
        read=learning.read,
        note=note,
        manifest=manifest,
        guard=_guard(config, folder, note),
        best=Best(config.train),
    )


def _guard(config: RunConfig, folder: pathlib.Path, note: Note) -> Guard:
    watched = not ALGORITHMS[config.algorithm].samples  # what policies learn from their own samples may cost more
    max_rise = config.train.max_rise if watched else None
    return Guard(config.train.on_nonfinite, sorted(config.adapters), folder, note, max_rise)


def _mesh(config: RunConfig, folder: pathlib.Path, note: Note) -> jax.sharding.Mesh:
    """The mesh of the run, which fits its surroundings."""
    mesh, remarks = check_surroundings(config, folder)
    for remark in remarks:
        note(remark)
    if mesh.size < jax.device_count():
        note(f"using {mesh.size} of {jax.device_count()} devices; mesh.data, mesh.fsdp and mesh.tensor use more")
    return mesh


def _base(
    config: RunConfig, mesh: jax.sharding.Mesh, tokenizer: Any, begun: resume.Begun, folder: pathlib.Path
) -> Base:
    """The model on the mesh, with the adapter that the run starts from. The plan of several adapters adds them."""
    settings = dict(dtype=config.model.dtype, quant=config.model.quant, vocab=config.model.resize_vocab)
    model, params = hub.load(config.model.path, mesh=mesh, **settings)
    if not config.adapters:
        params = adapt(model, params, config, begun.fixed)
    return based(config, model, params, mesh, tokenizer=tokenizer, workdir=folder)


def _describe_params(config: RunConfig, base: Base) -> str:
    frozen, trainable = base.frozen, base.trainable
    own = f"{tree.count(trainable):,} trainable parameters, " if trainable else ""
    text = f"{own}{tree.count(frozen):,} frozen in {size_of(tree.nbytes(frozen))}"
    text += f": {kinds}" if (kinds := quant.kept_in(frozen)) else ""
    text += f"; {_describe_full(config)}" if config.lora is None else ""
    return f"{text}; continuing from {config.model.adapter}" if config.model.adapter else text


def _describe_full(config: RunConfig) -> str:
    how = {"masters": "with float32 copies for the optimizer", "stochastic": "rounded at random"}[config.full.weights]
    held = config.model.dtype if config.model.dtype == "float32" else f"{config.model.dtype} {how}"
    return f"full fine-tuning: weights in {held}, moments in float32"


def _checkpoints(this: _Run) -> checkpoint.Checkpoints:
    """Those of the workdir, for a run whose settings are written there now."""
    if jax.process_index() == 0:  # one host writes what all of them know
        write_json(this.workdir / "config.json", to_dict(this.config))
        this.left_out.write(this.workdir)
    frozen = this.base.frozen
    return checkpoint.Checkpoints(
        this.workdir / "checkpoints",
        keep=this.config.train.keep_checkpoints,
        manifest=this.manifest | {"base": checkpoint.fingerprint(lora.strip(frozen))},
        refused_before=this.manifest.keys(),
        fixed=lora.adapter_leaves(frozen) | this.job.fixed,
        pinned=lambda steps: {this.best.step, *this.guard.sound(steps)},
    )


def _restore(this: _Run, saved: checkpoint.Checkpoints) -> int:
    """Goes to the newest checkpoint, if there is one, and returns how many steps are done."""
    if saved.latest is None:
        return 0
    this.state, position = saved.restore(this.state)
    this.job.source.set_state(position["source"])
    this.tokens = position["tokens"]
    this.guard.set_state(position.get("guard", {}))
    this.best.set_state(position.get("best", {}))
    _tell_best(this)
    return int(this.state.step)


def _tell_best(this: _Run) -> None:
    """Has best.json say what the run now knows, if anything."""
    path = this.workdir / BEST
    if jax.process_index() == 0 and this.best.step is not None:
        write_json(path, this.best.record())
    elif jax.process_index() == 0:
        path.unlink(missing_ok=True)


def _result(this: _Run, saved: checkpoint.Checkpoints) -> TrainState:
    """The state whose adapter the run leaves: the best evaluated one, if it is asked for, or the last."""
    best = this.best.step
    if best is None or not this.config.train.load_best or best == int(this.state.step):
        return this.state
    if best not in saved.kept():
        this.note(f"the checkpoint of the best step, {best}, is no longer there: the adapter is the last step's")
        return this.state
    this.note(f"the adapter is that of the best step: {this.best}")
    return saved.restore(this.state, best)[0]


@contextmanager
def _log(this: _Run, start: int, progress: Progress | None) -> Iterator[Log]:
    """The log of the steps after `start`. What files say about later steps, of a run that was cut off, is removed."""
    train = this.config.train
    if jax.process_index() == 0:
        truncate(this.workdir / COMPLETIONS, start)
        # A run that starts over (start == 0) rewrites the evaluation before the first step, so drop that too (-1).
        settings = json.loads(json.dumps(to_dict(this.config)))
        names = train.tracked if start < this.total_steps and not this.best.ended else ()
        trackers = open_trackers(names, this.workdir, settings, start=start, note=this.note)
        writer = MetricsWriter(this.workdir, start_step=start or -1, trackers=trackers)
    else:
        writer = None
    with writer or nullcontext():
        if progress:
            progress.start(this.total_steps, start)
        try:
            yield Log(writer, progress, train.log_every)
        except Interrupted:
            if writer:
                writer.close("interrupted")
            raise


def _steps(
    this: _Run, start: int, log: Log, saved: checkpoint.Checkpoints, trace: tracing.Trace, stop: Callable[[], bool]
) -> None:
    """Runs the steps from `start`.

    Each step is dispatched before the metrics of the previous one are read: JAX returns before anything is computed, so
    the device already has the next step to work on while the host reads metrics, logs and lays out a batch. But a
    state's arrays are donated to the next step, so a step whose state is still needed must be settled first: wait for
    it, check that it is finite, log it, and then save or evaluate it, while the data's position is still right after
    its batch, the last one requested. Settled steps are those to be saved or evaluated, the last one, the one at which
    the run is asked to stop, and every step of a source whose next batch depends on the state or the metrics
    (`Source.ahead`). While a step is settled, the device idles for as long as it takes to lay out one batch;
    checkpoints are written in the background.

    If an unsettled step turns out not to be finite, whatever was dispatched after it is dropped.
    """
    train, source = this.config.train, this.job.source
    if train.eval_on_start and start == 0:
        log.write(0, _evaluation(this))
    wanted = unsaved = stopping = False
    total_steps = start if this.best.ended else this.total_steps
    vote = sharding.Vote()

    def asked(any_host: Callable[[bool], bool]) -> bool:
        nonlocal stopping
        # Ask all hosts: a signal reaches them at different times, and a host that continued would wait for the others.
        stopping = stopping or any_host(stop())
        return stopping

    unread: _Sent | None = None

    def catch_up() -> None:
        nonlocal unread
        if unread:
            log.tell(unread.number, _read(this, unread, log, saved))
            trace.done(unread.number)
            unread = None

    for number in range(start + 1, total_steps + 1):
        with _kept(this, number - 1, saved, catch_up), trace.step(number):
            sent = _send(this, number)
        catch_up()
        final = number == total_steps
        wanted = bool(train.eval_every) and (wanted or final or number % train.eval_every == 0)
        # The best step needs a checkpoint, so where it is looked for, evaluation waits until one can be saved.
        evaluated = wanted and (final or source.boundary or this.best.metric is None)
        due = number % train.save_every == 0
        if source.ahead and not (final or evaluated or due or asked(vote)):
            unread = sent
            continue
        metrics = _read(this, sent, log, saved)
        trace.done(number)
        improved = False
        if evaluated:
            wanted = False
            with _kept(this, number, saved):
                metrics |= _evaluation(this)
                improved = this.best.see(number, metrics)
        final = final or this.best.ended
        ends = not final and source.boundary and asked(sharding.on_any_host)
        log.tell(number, metrics, at_once=evaluated or ends or final)
        unsaved = unsaved or due or improved
        if ends or final or (unsaved and source.boundary):
            saved.save(number, this.state, _position(this))
            unsaved = False
        if improved:
            _tell_best(this)
        if this.best.ended:
            break
        if ends:
            raise Interrupted(f"saved after step {number} of {this.total_steps} in {this.workdir}")


@contextmanager
def _kept(
    this: _Run, done: int, saved: checkpoint.Checkpoints, settle: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Saves the state after `done` steps if a user's reward or metric fails inside the block.

    That is, provided that a run can resume from there. With several hosts nothing is saved: a host that failed alone
    would wait for the others.

    Args:
        settle: reads the last of those steps if it was not read yet, and raises Diverged if it must not be saved.
    """
    source, whole = this.job.source.get_state(), this.job.source.boundary and jax.process_count() == 1
    try:
        yield
    except UserError:
        settle()
        if done and whole:
            saved.save(done, this.state, _position(this) | {"source": source})
        raise


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A dispatched step.

    Attributes:
        metrics: on the device, and perhaps not computed yet.
        tokens, found: what `Source.next` returned for its batch.
        length: row length of its batch.
        began: when its batch was requested.
    """

    number: int
    metrics: Metrics
    tokens: int
    found: Numbers
    length: int
    began: float


def _send(this: _Run, number: int) -> _Sent:
    """Dispatches a step; waits for nothing but its batch."""
    began = time.monotonic()
    batch, tokens, found = this.job.source.next(this.state)
    this.state, metrics = this.step(this.state, this.job.frozen, batch)
    return _Sent(number, metrics, tokens, found, batch["tokens"].shape[-1], began)


def _read(this: _Run, sent: _Sent, log: Log, saved: checkpoint.Checkpoints) -> Numbers:
    """Waits for a step and returns its numbers.

    Raises:
        Diverged: nothing is left to train.
        Failed: a checkpoint could not be written in the meantime.
    """
    metrics = jax.device_get(sent.metrics)
    # It had the device to itself since the previous step finished or since it began, whichever was later.
    now = time.monotonic()
    seconds, this.finished = now - max(sent.began, this.finished), now
    this.timed.append((sent.tokens, seconds, sent.length))
    seen = this.guard.see(metrics, sent.number)
    this.job.source.observe(metrics)
    this.tokens += sent.tokens
    speed = {"num_tokens": this.tokens, "tokens_per_second": sent.tokens / seconds}
    numbers = this.read(metrics, sent.number) | speed | sent.found | seen
    if this.guard.ended:
        log.write(sent.number, numbers)
        raise this.guard.error(saved.kept())
    saved.check()
    return numbers


def _evaluation(this: _Run) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in this.job.evaluate(this.state).items()}


def _position(this: _Run) -> dict[str, Any]:
    return {"source": this.job.source.get_state(), "tokens": this.tokens, "guard": this.guard.get_state()} | {
        "best": this.best.get_state()
    }
