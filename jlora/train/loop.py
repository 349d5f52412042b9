"""The training loop: mesh, data, model, state, restore, steps, adapter. All the mathematics is in the step."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import optax

from jlora import checkpoint, data, hub, lora, sharding, tree
from jlora.models import Model
from jlora.optim import learning_rate, make_optimizer
from jlora.train.config import RunConfig, to_dict
from jlora.train.evaluate import completion_loss
from jlora.train.metrics import MetricsWriter, can_plot, plot_curves
from jlora.train.progress import Progress
from jlora.train.sft import sft_loss
from jlora.train.state import TrainState, create_state
from jlora.train.step import Metrics, Step, make_step
from jlora.types import Params

# What may differ when a run is taken up again: how it is watched and where it runs, not what it computes.
FREE = {
    "mesh": None,
    "train": ("log_every", "save_every", "keep_checkpoints", "eval_every", "tensorboard", "remat"),
    "data": ("eval_path",),
}


class Interrupted(Exception):
    """The run was asked to stop and has saved everything; running it again goes on from there."""


@dataclasses.dataclass
class _Run:
    """What the loop holds while it runs."""

    config: RunConfig
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    model: Model
    tokenizer: Any
    batches: grain.DatasetIterator
    total_steps: int
    frozen: Params
    state: TrainState
    step: Step
    schedule: optax.Schedule
    note: Callable[[str], None]


def run(
    config: RunConfig,
    workdir: str | os.PathLike,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """The last step's metrics. Trains and leaves config.json, metrics.jsonl, curves.png, checkpoints/ and adapter/ in
    `workdir`.

    A workdir with checkpoints is taken up where it was left, and then computes what it would have computed without the
    pause.

    Args:
        progress: is told of every step.
        stop: asked after every step; once true, everything is saved and `Interrupted` raised.

    Raises:
        ValueError: the workdir belongs to a run with other settings, or the data, model or targets are not as they
        must be. Interrupted: see `stop`.
    """
    folder = pathlib.Path(workdir)
    _refuse_other_run(folder, config)
    this = _prepare(config, folder, progress.note if progress else lambda message: None)
    manifest = {"base": checkpoint.fingerprint(this.frozen), "lora": dataclasses.asdict(config.lora)}
    _write_json(folder / "config.json", to_dict(config))
    saved = checkpoint.Checkpoints(folder / "checkpoints", keep=config.train.keep_checkpoints, manifest=manifest)
    try:
        start = 0
        if saved.latest is not None:
            this.state, position = saved.restore(this.state)
            this.batches.set_state(position)
            start = int(this.state.step)
        with MetricsWriter(folder, start_step=start, tensorboard=config.train.tensorboard) as writer:
            last = _steps(this, start, writer, saved, progress, stop)
    finally:
        saved.close()
    _finish(this)
    return last


def _prepare(config: RunConfig, folder: pathlib.Path, note: Callable[[str], None]) -> _Run:
    """Everything up to the first step; what the user may have got wrong is found before anything is written."""
    train = config.train
    mesh = sharding.make_mesh(config.mesh)
    if mesh.size < jax.device_count():
        note(f"using {mesh.size} of {jax.device_count()} devices; mesh.data, mesh.fsdp and mesh.tensor use more")
    records = data.read_records(config.data.path)
    tokenizer = hub.load_tokenizer(config.model.path)
    examples, encoded = data.encode(
        records,
        tokenizer,
        seq_len=train.seq_len,
        overlong=config.data.overlong,
        completion_only=config.data.completion_only,
    )
    steps = data.plan(
        [len(example.tokens) for example in examples],
        seq_len=train.seq_len,
        batch_size=train.batch_size * train.grad_accum,
        packing=config.data.packing,
        bucket=config.data.bucket,
        seed=train.seed,
        epochs=train.epochs,
        steps=train.steps,
    )
    note(_describe_data(encoded, steps))
    model, params = hub.load(config.model.path, dtype=config.model.dtype, quant=config.model.quant, mesh=mesh)
    params = lora.init(params, config.lora, jax.random.key(train.seed))
    frozen, trainable = lora.split(params)
    note(_describe_params(frozen, trainable))
    optimizer = make_optimizer(config.optim, len(steps))
    state = create_state(trainable, optimizer, train.seed, mesh)
    return _Run(
        config=config,
        workdir=folder,
        mesh=mesh,
        model=model,
        tokenizer=tokenizer,
        batches=data.loader(examples, steps, train.grad_accum),
        total_steps=len(steps),
        frozen=sharding.shard(frozen, mesh),
        state=state,
        step=make_step(
            sft_loss(model, remat=train.remat),
            optimizer,
            jax.tree.map(lambda leaf: leaf.sharding, state),
            dropout=config.lora.lora_dropout > 0,
        ),
        schedule=learning_rate(config.optim, len(steps)),
        note=note,
    )


def _steps(
    this: _Run,
    start: int,
    writer: MetricsWriter,
    saved: checkpoint.Checkpoints,
    progress: Progress | None,
    stop: Callable[[], bool],
) -> dict[str, float]:
    """Runs the steps from `start`; the last one's metrics."""
    train = this.config.train
    if progress:
        progress.start(this.total_steps, start)
    last: dict[str, float] = {}
    for number, metrics in _metrics(this, start):
        if train.eval_every and (number % train.eval_every == 0 or number == this.total_steps):
            metrics |= {f"eval_{name}": value for name, value in _evaluate(this).items()}
        if number % train.log_every == 0 or number == this.total_steps:
            writer.write(number, metrics)
        if progress:
            progress.update(number, metrics)
        stopping = stop() and number < this.total_steps
        if stopping or number % train.save_every == 0 or number == this.total_steps:
            saved.save(number, this.state, this.batches.get_state())
        if stopping:
            raise Interrupted(f"saved after step {number} of {this.total_steps} in {this.workdir}")
        last = metrics
    return last


def _metrics(this: _Run, start: int) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, its metrics), each after the step is done."""
    for number in range(start + 1, this.total_steps + 1):
        batch = next(this.batches)
        began = time.monotonic()
        this.state, sums = this.step(this.state, this.frozen, sharding.put_batch(batch, this.mesh))
        yield number, _report(this, number, sums, int((batch["segment_ids"] > 0).sum()), began)


def _report(this: _Run, number: int, sums: Metrics, tokens: int, began: float) -> dict[str, float]:
    values = {name: float(value) for name, value in sums.items()}
    weight = max(values["weight"], 1.0)
    return {
        "loss": values["loss"] / weight,
        "mean_token_accuracy": values["correct"] / weight,
        "grad_norm": values["grad_norm"],
        "learning_rate": float(this.schedule(number - 1)),
        "num_tokens": tokens,
        "tokens_per_second": tokens / (time.monotonic() - began),
    }


def _evaluate(this: _Run) -> dict[str, float]:
    train = this.config.train
    records = data.read_records(this.config.data.eval_path)
    params = lora.combine(this.frozen, this.state.trainable)
    rows = train.batch_size
    return completion_loss(
        this.model, params, this.tokenizer, records, batch_size=rows, seq_len=train.seq_len, mesh=this.mesh
    )


def _finish(this: _Run) -> None:
    params = lora.combine(this.frozen, this.state.trainable)
    if jax.process_index() == 0:
        hub.save_adapter(this.workdir / "adapter", params, base=this.config.model.path)
        if can_plot():
            plot_curves(this.workdir)
        else:
            this.note("no curves.png: pip install 'jlora[plots]' draws it")


def _describe_params(frozen: Params, trainable: Params) -> str:
    mebibytes = tree.nbytes(frozen) / 2**20
    return f"{tree.count(trainable):,} trainable parameters, {tree.count(frozen):,} frozen in {mebibytes:,.0f} MiB"


def _describe_data(encoded: data.EncodeReport, steps: list[data.Step]) -> str:
    text = (
        f"{encoded.examples} examples, {encoded.tokens:,} tokens of which {encoded.trained_tokens:,} are trained; "
        f"{len(steps)} steps, rows of {', '.join(str(n) for n in sorted({step.length for step in steps}))} tokens"
    )
    lost = {
        "cut at seq_len": encoded.cut,
        "dropped as too long": encoded.dropped,
        "without a trained token": encoded.untrained,
    }
    return "; ".join([text, *(f"{count} {what}" for what, count in lost.items() if count)])


def _refuse_other_run(folder: pathlib.Path, config: RunConfig) -> None:
    """Raises ValueError when the workdir holds a run whose settings differ in more than `FREE`."""
    path = folder / "config.json"
    if not path.exists():
        return
    found, expected = (_fixed(json.loads(text)) for text in (path.read_text(), json.dumps(to_dict(config))))
    if differences := checkpoint.compare(found, expected):
        raise ValueError(
            f"{folder} belongs to a run with other settings; choose another workdir, or give the same settings:\n  "
            + "\n  ".join(differences)
        )


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        group: {name: value for name, value in values.items() if name not in FREE.get(group, ())}
        if isinstance(values, dict)
        else values
        for group, values in settings.items()
        if FREE.get(group, ()) is not None
    }


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(part, path)
