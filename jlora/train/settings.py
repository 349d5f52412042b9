"""The groups of settings that every run has, whatever its algorithm; an algorithm's own groups are in its file."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from jlora.data import DataConfig
from jlora.errors import UserError, raise_all
from jlora.hub.checkpoints.resize import check_vocab
from jlora.kernels.attention import AUTO, FORMS
from jlora.lora import FullConfig, LoraConfig, is_trainable
from jlora.names import ExpertLayout
from jlora.optim import OptimConfig
from jlora.quant import QuantConfig, as_config
from jlora.sharding import MeshConfig

TASK = "reasoning_gym:"  # prefix of a data.path that names a generated task
# What has no effect without another setting.
WATCHING = {
    "eval_on_start": "eval_every",
    "metrics": "eval_every",
    "best_metric": "eval_every",
    "patience": "best_metric",
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the base model comes from and how it is held.

    Attributes:
        path: a Hugging Face folder, a Hub id, or a GGUF file.
        dtype: of computation and of unquantised weights: "float32", "bfloat16" or "float16". None: bfloat16 on TPU and
            GPU, float32 on CPU; a resumed run keeps the one it began with.
        quant: "nf4", "fp4", "int4", "int8", "mxfp4", a QuantConfig, or None for the weights as the checkpoint has them.
        adapter: a PEFT folder to continue from; its settings replace the group `lora`.
        resize_vocab: rows of embedding and head; "tokenizer": as many as the tokenizer needs; None: unchanged. New rows
            are the mean of the others; lora.trainable_token_indices or modules_to_save train them.
        attention: the form that computes it: "plain", "blocked", "splash" (TPU) or "triton" (NVIDIA); "auto" picks the
            best for the device.
    """

    path: str
    dtype: str | None = None
    quant: str | QuantConfig | None = None
    adapter: str | None = None
    resize_vocab: int | str | None = None
    attention: str = AUTO

    @property
    def merges_packed(self) -> bool:
        """Whether the adapter is trained to be merged into the base and packed with it."""
        return isinstance(self.quant, QuantConfig) and self.quant.merge_aware

    def __post_init__(self) -> None:
        faults = []
        if not self.path:
            faults.append("model.path: found '', expected a folder, a Hub id or a GGUF file")
        if self.dtype not in (None, *DTYPES):
            faults.append(f"model.dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}, or None")
        if self.attention not in (AUTO, *FORMS):
            faults.append(f"model.attention: found {self.attention!r}, expected one of {', '.join((AUTO, *FORMS))}")
        try:
            as_config(self.quant)
        except UserError as error:
            faults.append(f"model.quant: {error}")
        try:
            check_vocab(self.resize_vocab, "model.resize_vocab")
        except UserError as error:
            faults.append(str(error))
        raise_all(faults)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, how much to compute at once, and how often to log, save and evaluate.

    Attributes:
        steps: the run ends after so many steps; this or `epochs` is required, and with both what comes first counts.
        epochs: the run ends after so many passes over the data. A fraction of an epoch is that fraction of its rows,
            rounded up to whole steps.
        batch_size: rows of a micro-batch, over all devices.
        seq_len: tokens of a row.
        grad_accum: micro-batches of a step.
        seed: decides the adapter's initialisation, the order of the data, and dropout.
        log_every: steps from one line of the log to the next.
        save_every: steps from one checkpoint to the next.
        eval_every: steps from one evaluation to the next; 0: never.
        eval_on_start: also evaluate before the first step, so that the log shows what training changed.
        metrics: what else the evaluation measures, on texts that it generates: "FILE.py:FUNCTION", "FILE.py" for a
            metric(record, text) as `jlora eval` takes it, or "exact_match"; see `jlora.train.evaluation.metrics`.
        metric_tokens: the most new tokens of a text that `metrics` judge.
        best_metric: the number of the evaluation, such as "eval_loss", that says which step is best. Its checkpoint is
            kept, and best.json says which it is.
        greater_is_better: whether `best_metric` is best when it is greatest; None: as its name says (losses and
            perplexities are best when they are smallest, all else when it is greatest).
        load_best: save the adapter of the best step at the end, rather than the last step's.
        patience: end the run after this many evaluations in a row that were not the best so far; 0: never.
        keep_checkpoints: how many checkpoints to keep; older ones are removed, but for the best.
        remat: which of a layer's activations are kept for the backward pass: "full" keeps the layer's input and
            computes the rest again, "offload" does the same with the inputs in host memory, "none" keeps what is
            expensive to compute. True means "full", False "none".
        on_nonfinite: what to do when the loss, the gradient or the adapter is no longer finite: "stop" the run with its
            last checkpoint kept, or "skip" the step (ten in a row stop the run). Other adapters of the run continue.
        max_rise: stop the run, with the last good checkpoint kept, once the loss explodes: ten steps in a row lie above
            the lowest mean of ten steps by more than this many times the loss that the run began with (at least 1).
            None: never. Losses of `grpo` and `ppo` may rise: they are not watched.
        on_changed_files: what a resumed run does when its data, rewards or tokenizer have changed: "refuse", or "note"
            what changed and continue.
        trackers: experiment trackers that also get the numbers, each with the extra of its name; see
            `jlora.train.reporting.trackers`.
        tensorboard: the same as "tensorboard" among the trackers.
        project: what trackers file the run under.
        run_name: what trackers call the run; None: as its workdir.
        profile: number of steps to trace, after the first two; see `jlora.train.reporting.tracing`.
        fold: save the adapter with one rank and one scale for all modules, like `jlora export --fold`.
        experts: save adapters of experts as PEFT does ("stacked") or each by itself, as vLLM and SGLang read them.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    seq_len: int = 512
    grad_accum: int = 1
    seed: int = 0
    log_every: int = 1
    save_every: int = 100
    keep_checkpoints: int = 2
    eval_every: int = 0
    eval_on_start: bool = False
    metrics: tuple[str, ...] = ()
    metric_tokens: int = 128
    best_metric: str | None = None
    greater_is_better: bool | None = None
    load_best: bool = True
    patience: int = 0
    remat: bool | Literal["full", "offload", "none"] = True
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    tensorboard: bool = False
    project: str = "jlora"
    run_name: str | None = None
    profile: int = 0
    fold: bool = False
    experts: ExpertLayout = "stacked"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_rise: float | None = 2.0
    on_changed_files: Literal["refuse", "note"] = "refuse"

    def __post_init__(self) -> None:
        faults = []
        if self.steps is None and self.epochs is None:
            faults.append("train.steps or train.epochs: one of them is required")
        if self.epochs is not None and not self.epochs > 0:
            faults.append(f"train.epochs: found {self.epochs}, expected more than 0")
        least = {"steps": 1, "batch_size": 1, "seq_len": 2, "grad_accum": 1, "log_every": 1, "save_every": 1}
        least |= {"keep_checkpoints": 1, "eval_every": 0, "seed": 0, "profile": 0, "patience": 0, "metric_tokens": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                faults.append(f"train.{name}: found {value}, expected at least {bound}")
        for name, needs in WATCHING.items():
            if getattr(self, name) and not getattr(self, needs):
                faults.append(f"train.{name}: has no effect without train.{needs}")
        if self.max_rise is not None and not self.max_rise > 0:
            faults.append(f"train.max_rise: found {self.max_rise}, expected more than 0, or None")
        if self.greater_is_better is not None and not self.best_metric:
            faults.append("train.greater_is_better: has no effect without train.best_metric")
        raise_all(faults)

    @property
    def tracked(self) -> tuple[str, ...]:
        """The trackers, each once."""
        return tuple(dict.fromkeys((*self.trackers, *(["tensorboard"] if self.tensorboard else []))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """The groups of every run.

    `jlora.train.config.RunConfig` adds those of the algorithms, under the names that `Algorithm.groups` gives them, so
    that the code of an algorithm reads its own as `config.dpo`.

    Attributes:
        lora: the adapter; None: no adapter, but weights of the base itself, which `full` chooses.
    """

    algorithm: str = "sft"
    model: ModelSource
    lora: LoraConfig | None = LoraConfig()
    full: FullConfig = FullConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()

    @property
    def task(self) -> str | None:
        """The name of the generated task that provides the prompts; None for files."""
        path = self.data.path
        return path.removeprefix(TASK) if isinstance(path, str) and path.startswith(TASK) else None

    @property
    def trains(self) -> Callable[[str], bool]:
        """(path) → whether the run trains the leaf."""
        return self.full.trains if self.lora is None else is_trainable


def at_least(group: str, settings: Any, **bounds: int | float) -> list[str]:
    """A fault for each setting that is not a finite number of at least its bound."""
    return [
        f"{group}.{name}: found {value}, expected a number of at least {bound:g}"
        for name, bound in bounds.items()
        if not ((value := getattr(settings, name)) >= bound and math.isfinite(value))
    ]
