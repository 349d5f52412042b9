"""The training loop: mesh, data, model, state, restore, steps, adapter. All the maths is in the step."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax

from jlora import checkpoint, data, hub, lora, sharding, tree
from jlora.errors import UserError
from jlora.train import many, resume
from jlora.train.adapt import adapt, based
from jlora.train.algorithms import ALGORITHMS
from jlora.train.algorithms.algorithm import Base, Job, Note, Numbers
from jlora.train.algorithms.rollout import FILE as COMPLETIONS
from jlora.train.config import RunConfig, to_dict
from jlora.train.early import check_surroundings
from jlora.train.finite import Guard
from jlora.train.learning import learn
from jlora.train.reporting import tracing, usage
from jlora.train.reporting.metrics import MetricsWriter, can_plot, plot_curves, truncate
from jlora.train.reporting.progress import Progress
from jlora.train.state import TrainState
from jlora.train.step import Metrics, Step
from jlora.types import Params


class Interrupted(Exception):
    """The run was asked to stop and has saved everything; running it again continues from there."""


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
    manifest: dict[str, Any]
    # Tokens read by the finished steps, and when the last of them finished.
    tokens: int = 0
    finished: float = 0.0
    # Tokens, seconds and row length of each step since the start, and the process's peak memory before it.
    timed: list[tuple[int, float, int]] = dataclasses.field(default_factory=list)
    grown_from: int = 0


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


@dataclasses.dataclass
class _Log:
    """Reports finished steps to metrics.jsonl and the progress display.

    Attributes:
        last: the newest step's metrics.
    """

    writer: MetricsWriter | None
    progress: Progress | None
    every: int
    last: Numbers = dataclasses.field(default_factory=dict)
    # Some numbers come with a rollout rather than with every step: keep them for the next line written.
    _unlogged: Numbers = dataclasses.field(default_factory=dict)

    def tell(self, number: int, metrics: Numbers, *, at_once: bool = False) -> None:
        """Adds a step; `at_once` writes it to metrics.jsonl whatever `train.log_every` says."""
        if at_once or number % self.every == 0:
            self.write(number, metrics)
        else:
            self._unlogged |= metrics
        if self.progress:
            self.progress.update(number, metrics)
        self.last = metrics

    def write(self, number: int, metrics: Numbers) -> None:
        """Adds an object to metrics.jsonl."""
        if self.writer:
            self.writer.write(number, self._unlogged | metrics)
        self._unlogged = {}


def run(
    config: RunConfig,
    workdir: str | os.PathLike,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Trains, writes config.json, metrics.jsonl, curves.png, checkpoints/ and adapter/ to `workdir`, and returns the
    last step's metrics.

    If the workdir has checkpoints, the run resumes from the newest one and computes what it would have computed without
    the pause.

    Args:
        progress: is told about every step.
        stop: called once per step; once it returns True, that step is finished (with several hosts, the next one),
            everything is saved and `Interrupted` is raised.

    Raises:
        ValueError: the workdir belongs to a run with different settings, different data or another version of jlora, or
            the data, model or targets are invalid.
        Diverged: numbers are no longer finite, and nothing is left to train.
        Interrupted: see `stop`.
    """
    folder = pathlib.Path(workdir)
    grown_from = usage.process_peak()
    begun = resume.read_begun(folder)
    config = resume.with_dtype(begun, config)
    resume.refuse_other_settings(begun, config)
    this = _prepare(config, folder, begun, progress.note if progress else lambda message: None)
    this.grown_from = grown_from
    first = jax.process_index() == 0  # one host writes what all of them know
    if first:
        _write_json(folder / "config.json", to_dict(config))
    saved = checkpoint.Checkpoints(
        folder / "checkpoints",
        keep=config.train.keep_checkpoints,
        manifest=this.manifest | {"base": checkpoint.fingerprint(lora.strip(this.base.frozen))},
        refused_before=this.manifest.keys(),
        fixed=lora.adapter_leaves(this.base.frozen) | this.job.fixed,
    )
    try:
        start = 0
        if saved.latest is not None:
            this.state, position = saved.restore(this.state)
            this.job.source.set_state(position["source"])
            this.tokens = position["tokens"]
            this.guard.set_state(position.get("guard", {}))
            start = int(this.state.step)
        if first:
            truncate(folder / COMPLETIONS, start)
        # A run that starts over (start == 0) rewrites the evaluation before the first step, so drop that too (-1).
        board = config.train.tensorboard
        writing = MetricsWriter(folder, start_step=start or -1, tensorboard=board) if first else nullcontext()
        with writing as writer:
            if progress:
                progress.start(this.total_steps, start)
            log = _Log(writer, progress, config.train.log_every)
            with tracing.Trace(folder, config.train.profile, start, this.total_steps, this.note) as trace:
                _steps(this, start, log, saved, trace, stop)
    finally:
        saved.close()
    _tell_usage(this)
    _finish(this)
    return log.last


def _prepare(config: RunConfig, folder: pathlib.Path, begun: resume.Begun, note: Note) -> _Run:
    """Everything up to the first step; user mistakes are found before anything is written.

    Args:
        begun: the run that the workdir holds.
    """
    mesh, remarks = check_surroundings(config, folder)
    for remark in remarks:
        note(remark)
    if mesh.size < jax.device_count():
        note(f"using {mesh.size} of {jax.device_count()} devices; mesh.data, mesh.fsdp and mesh.tensor use more")
    described = hub.read_model(config.model.path, config.model.resize_vocab).config
    date = begun.date
    tokenizer = data.fitted(hub.load_tokenizer(config.model.path), described.vocab_size, date)
    if config.model.adapter:
        hub.say_unused_tokenizer(tokenizer, config.model.adapter)
    if config.data.system == "fold":
        data.fold_system(tokenizer)
    one = ALGORITHMS[config.algorithm].plan
    plan = many.plan(config, tokenizer, note, one, begun.fixed) if config.adapters else one(config, tokenizer, note)
    described.warn_beyond(plan.longest, f"the texts of {config.data.path}")
    manifest = resume.manifest(config, tokenizer, plan, date)
    resume.refuse_other_files(begun, manifest, note if config.train.on_changed_files == "note" else None)
    resume.refuse_fewer_steps(begun, plan.total_steps, note)
    settings = dict(dtype=config.model.dtype, quant=config.model.quant, vocab=config.model.resize_vocab)
    model, params = hub.load(config.model.path, mesh=mesh, **settings)
    if not config.adapters:  # for several adapters, the plan adds them to the base
        params = adapt(model, params, config, begun.fixed)
    base = based(config, model, params, mesh, tokenizer=tokenizer, workdir=folder)
    note(_describe_params(config, base.frozen, base.trainable))
    job = plan.start(base)
    learning = (job.learn or learn)(config, base, job, plan.total_steps)
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
        guard=Guard(config.train.on_nonfinite, sorted(config.adapters), folder, note),
    )


def _steps(
    this: _Run,
    start: int,
    log: _Log,
    saved: checkpoint.Checkpoints,
    trace: tracing.Trace,
    stop: Callable[[], bool],
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
    unsaved = stopping = False
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

    for number in range(start + 1, this.total_steps + 1):
        with _kept(this, number - 1, saved, catch_up), trace.step(number):
            sent = _send(this, number)
        catch_up()
        final = number == this.total_steps
        evaluated = bool(train.eval_every) and (final or number % train.eval_every == 0)
        due = number % train.save_every == 0
        if source.ahead and not (final or evaluated or due or asked(vote)):
            unread = sent
            continue
        metrics = _read(this, sent, log, saved)
        trace.done(number)
        if evaluated:
            with _kept(this, number, saved):
                metrics |= _evaluation(this)
        ends = not final and source.boundary and asked(sharding.on_any_host)
        log.tell(number, metrics, at_once=evaluated or ends or final)
        unsaved = unsaved or due
        if ends or final or (unsaved and source.boundary):
            saved.save(number, this.state, _position(this))
            unsaved = False
        if ends:
            raise Interrupted(f"saved after step {number} of {this.total_steps} in {this.workdir}")


def _evaluation(this: _Run) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in this.job.evaluate(this.state).items()}


@contextmanager
def _kept(
    this: _Run, done: int, saved: checkpoint.Checkpoints, settle: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """If a user's reward or metric fails inside the block, saves the state after `done` steps, provided that a run can
    resume from there. With several hosts nothing is saved: a host that failed alone would wait for the others.

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


def _send(this: _Run, number: int) -> _Sent:
    """Dispatches a step; waits for nothing but its batch."""
    began = time.monotonic()
    batch, tokens, found = this.job.source.next(this.state)
    this.state, metrics = this.step(this.state, this.job.frozen, batch)
    return _Sent(number, metrics, tokens, found, batch["tokens"].shape[-1], began)


def _read(this: _Run, sent: _Sent, log: _Log, saved: checkpoint.Checkpoints) -> Numbers:
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


def _position(this: _Run) -> dict[str, Any]:
    return {"source": this.job.source.get_state(), "tokens": this.tokens, "guard": this.guard.get_state()}


def _tell_usage(this: _Run) -> None:
    """Reports the usage of the steps since the start and writes it to usage.json. The first two steps compile, so they
    count only if there are no others. MFU is reported only if nothing else reads or writes the counted tokens.
    """
    timed = sorted(this.timed[2:] or this.timed, key=lambda one: one[0] / one[1])
    if not timed:
        return
    tokens, seconds, length = timed[(len(timed) - 1) // 2]
    flops = None
    if ALGORITHMS[this.config.algorithm].reads_once:
        params = next(iter(this.job.adapters(this.state.trainable).values()))
        flops = usage.flops_per_token(this.base.model.config, *lora.split(params), length)
    devices = this.base.mesh.devices.ravel().tolist()
    used = usage.summary(tokens, seconds, flops, used=devices, grown_from=this.grown_from)
    this.note(f"{used} (median of {len(timed)} steps)")
    if jax.process_index() == 0:
        about = {"device": devices[0].device_kind, "devices": len(devices), "steps": len(timed)}
        _write_json(this.workdir / "usage.json", used.numbers() | about)


def _finish(this: _Run) -> None:
    adapters = {name: _gathered(params) for name, params in this.job.adapters(this.state.trainable).items()}
    if jax.process_index() == 0:
        for name, params in adapters.items():
            hub.save_adapter(
                this.workdir / name,
                params,
                base=this.config.model.path,
                fold=this.config.train.fold,
                save_embedding_layers=this.config.model.resize_vocab is not None,
            )
            if note := hub.scales_note(this.workdir / name):
                this.note(f"{name}: {note}")
        if can_plot():
            plot_curves(this.workdir, this.job.panels)
        else:
            this.note("no plots: pip install 'jlora[plots]' draws them")
    this.job.finish(this.state)


def _gathered(params: Params) -> Params:
    """The params with everything that an adapter's file holds on this host: the adapter's leaves, and the embedding and
    head if it adapts them.
    """
    if jax.process_count() == 1:
        return params
    adapted = {path.rpartition("/")[0] for path in tree.flatten(params) if lora.is_adapter(path)}

    def gather(path: str, leaf: Any) -> Any:
        alone = path.rpartition("/")[0] in adapted and tree.stack_of(path) is None
        return sharding.on_host(leaf) if alone or lora.is_adapter(path) else leaf

    return tree.map_with_path(gather, params)


def _describe_params(config: RunConfig, frozen: Params, trainable: Params) -> str:
    mebibytes = tree.nbytes(frozen) / 2**20
    own = f"{tree.count(trainable):,} trainable parameters, " if trainable else ""
    text = f"{own}{tree.count(frozen):,} frozen in {mebibytes:,.0f} MiB"
    return f"{text}; going on from {config.model.adapter}" if config.model.adapter else text


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(part, path)
