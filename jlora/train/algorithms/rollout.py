"""Batches sampled from the policy itself: prompts, completions, rewards, and what the step needs to know about them."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jlora import data, lora, sharding
from jlora.data import Example, Item
from jlora.errors import UserError, number_of, raise_all
from jlora.generate import Completion, rollout
from jlora.losses.advantages import overlong_penalty
from jlora.train.algorithms.algorithm import Base, Numbers
from jlora.train.algorithms.prompts import Judges, Prompts
from jlora.train.algorithms.reward_model import RewardModel
from jlora.train.rewards.judging import RewardTable, TrainerState, total
from jlora.train.settings import SharedConfig, at_least
from jlora.train.state import TrainState
from jlora.train.step import FINITE, Batch, Metrics
from jlora.types import Params

FILE = "completions.jsonl"


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What is sampled from the policy and how it is judged.

    Attributes:
        num_generations: completions per prompt.
        max_completion_length: the most tokens of a completion; prompts may have up to `train.seq_len` minus this.
        temperature: what logits are divided by before a token is drawn.
        top_k: draw among so many of the likeliest tokens; 0: among all.
        top_p: draw among the likeliest tokens that together have this probability.
        rows: completions that are sampled at once; finished ones make room for the next.
        rewards: "FILE.py:FUNCTION", "metric:FILE.py:KEY", "reasoning_gym", or "model" for `reward_model`; see
            `jlora.train.rewards.judging`.
        reward_weights: one for each of `rewards`; None: 1 each.
        reward_model: a PEFT folder with a score head, as saved by `algorithm="reward"`.
        on_error: "raise" ends the run when a reward fails or a whole group is empty; "skip" leaves it out. May be
            changed when a run is resumed.
        task_size: how many questions to draw of the reasoning-gym task that data.path="reasoning_gym:NAME" names.
        task_settings: the task's own settings (needs the extra `tasks`).
        eval_size: how many held-out prompts to evaluate on.
        system_prompt: a text that is put before the task's questions.
        num_fewshot: how many solved questions of the task precede each question, always the same ones.
        eval_temperature: the temperature of completions that evaluation judges; 0 takes the likeliest tokens.
        log_completions: how many examples of every rollout go to completions.jsonl.
    """

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rows: int = 32
    rewards: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] | None = None
    reward_model: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    task_size: int = 1000
    task_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eval_size: int = 64
    eval_temperature: float = 0.0
    system_prompt: str | None = None
    num_fewshot: int = 0
    log_completions: int = 4

    def __post_init__(self) -> None:
        least = dict(
            num_generations=1, max_completion_length=1, top_k=0, rows=1, task_size=1, eval_size=1, num_fewshot=0
        )
        faults = at_least("rollout", self, temperature=1e-6, eval_temperature=0, log_completions=0, **least)
        if not 0 < self.top_p <= 1:
            faults.append(f"rollout.top_p: found {self.top_p}, expected a probability in (0, 1]")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            faults.append(
                f"rollout.reward_weights: found {len(self.reward_weights)}, expected one for each of "
                f"{number_of(len(self.rewards), 'reward')}"
            )
        if ("model" in self.rewards) != (self.reward_model is not None):
            faults.append('rollout.reward_model and the reward "model": one is given without the other')
        raise_all(faults)


def faults(config: SharedConfig, completions: int) -> list[str]:
    """What is wrong with the settings of an algorithm that samples this many completions in a rollout."""
    settings, train = config.rollout, config.train
    found = []
    if completions % settings.num_generations:
        found.append(
            f"a rollout has {number_of(completions, 'completion')}: not a multiple of rollout.num_generations = "
            f"{settings.num_generations}; change train.batch_size or train.grad_accum"
        )
    if settings.max_completion_length >= train.seq_len:
        found.append(
            f"rollout.max_completion_length is {settings.max_completion_length}: leaves no room for a prompt in "
            f"train.seq_len = {train.seq_len}"
        )
    if not settings.rewards and config.task is None:
        found.append("rollout.rewards: found none, expected at least one")
    if train.steps is None:
        found.append("train.steps: is required, since rollouts have no end")
    return found


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Groups of completions, group after group, and what they earned.

    Attributes:
        numbers: each completion's prompt, as an index into `Prompts`.
        items: each prompt and completion as one document whose completion is trained; `index` is its place here.
        table: what each reward function gave.
        rewards: their weighted sums [N], NaN where no function gave one.
        digest: checksum of the policy's weights that the sampler used.
    """

    numbers: list[int]
    completions: list[Completion]
    texts: list[str]
    items: list[Item]
    table: RewardTable
    rewards: np.ndarray
    digest: int


class Sampler:
    """Samples completions from any policy on its base, and judges them."""

    def __init__(
        self, config: SharedConfig, base: Base, judges: Judges, *, overlong: int = 0, masked: bool = False
    ) -> None:
        """For completions that the judges judge.

        Args:
            overlong: length of the zone before the maximum length that costs a penalty; 0: there is none.
            masked: completions without a stop token are not trained on.
        """
        settings = config.rollout
        self._config, self._base, self._functions = config, base, judges.functions
        names = judges.names
        weights = settings.reward_weights or (1.0,) * len(names)
        model_weight = [weights[names.index("model")]] if "model" in names else []
        self._overlong, self._masked = overlong, masked
        self.weights = np.array(
            [*self._functions.weights, *model_weight, *([1.0] if self._overlong else [])], np.float32
        )
        self._reward_model = RewardModel(base, config) if settings.reward_model else None
        model = base.model.config
        self._stops = data.stop_ids(base.tokenizer, model.eos_token_ids, model.vocab_size)

    def __call__(
        self,
        trainable: Params,
        prompts: Prompts,
        numbers: Sequence[int],
        seed: tuple[int, ...],
        *,
        step: int,
        greedy: bool = False,
    ) -> Rollouts:
        """Samples and judges a completion for each of `numbers`, which are indices into the prompts.

        Args:
            trainable: the policy's adapter.
            seed: numbers that determine the draws.
            step: optimizer steps done so far, which rewards are told.
            greedy: sample at `rollout.eval_temperature`, as for evaluation.

        Raises:
            ValueError: a reward failed, unless failures are skipped.
        """
        settings = self._config.rollout
        completions, digest = rollout(
            self._base.model,
            lora.combine(self._base.frozen, trainable),
            [prompts.tokens(number) for number in numbers],
            _keys(seed, len(numbers)),
            rows=settings.rows,
            max_new_tokens=settings.max_completion_length,
            stop_ids=self._stops,
            temperature=settings.eval_temperature if greedy else settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        texts = [self._base.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
        items = [
            _item(prompts.tokens(number), completion, index, trained=completion.finished or not self._masked)
            for index, (number, completion) in enumerate(zip(numbers, completions, strict=True))
        ]
        records = [prompts.records[number] for number in numbers]
        table = self._functions.of_records(
            records,
            texts,
            [completion.tokens.tolist() for completion in completions],
            trainer_state=TrainerState(step, self._config.train.steps),
            columns=prompts.columns,
        )
        if self._reward_model is not None:
            chats = [not isinstance(record["prompt"], str) for record in records]
            ended = [chat and completion.finished for chat, completion in zip(chats, completions, strict=True)]
            scores = self._judged(items, ended, numbers)
            table = with_column(table, "model", scores, errors=int(np.isnan(scores).sum()))
        if self._overlong:
            lengths = np.array([len(completion.tokens) for completion in completions])
            penalty = overlong_penalty(lengths, settings.max_completion_length, self._overlong)
            table = with_column(table, "overlong", np.where(table.scored, penalty, np.nan))
        return Rollouts(list(numbers), completions, texts, items, table, total(table.values, self.weights), int(digest))

    def _judged(self, items: Sequence[Item], ended: Sequence[bool], numbers: Sequence[int]) -> np.ndarray:
        """The reward model's scores. Those that are not finite become NaN if failures are skipped.

        Raises:
            UserError: a score is not finite, and failures are not skipped.
        """
        scores = self._reward_model(items, ended, numbers)
        failed = np.flatnonzero(~np.isfinite(scores))
        if len(failed) and self._config.rollout.on_error == "raise":
            raise UserError(
                f"the reward model {self._config.rollout.reward_model} gave {len(failed)} of "
                f"{number_of(len(scores), 'completion')} no finite score (the first is completion {failed[0]}: "
                f"{scores[failed[0]]}); retrain it with a lower optim.learning_rate, or set "
                "rollout.on_error='skip' to leave them out"
            )
        return np.where(np.isfinite(scores), scores, np.nan)


class RolloutSource:
    """Batches from the current policy: a rollout is sampled when the batches of the last one are used up."""

    ahead = False

    def __init__(
        self,
        config: SharedConfig,
        base: Base,
        prompts: Prompts,
        collect: Callable[["RolloutSource", TrainState], tuple[list[data.Batch | Batch], Numbers, Rollouts]],
    ) -> None:
        self.config, self.base, self.prompts = config, base, prompts
        self.drawn = 0
        self.memory: dict[str, Any] = {}
        self._collect = collect
        self._queue: list[Batch] = []
        self._digest: int | None = None

    @property
    def boundary(self) -> bool:
        """Whether every batch of the last rollout has been used."""
        return not self._queue

    def draw(self, count: int) -> list[int]:
        """The numbers of the next prompts."""
        numbers = self.prompts.order(self.config.train.seed, self.drawn, count)
        self.drawn += count
        return numbers

    def next(self, state: TrainState) -> tuple[Batch, int, Numbers]:
        """The next batch; a rollout's numbers are reported with its first batch."""
        self._digest = None
        numbers: Numbers = {}
        if not self._queue:
            self._queue, numbers, rollouts = self._collect(self, state)
            self._digest = rollouts.digest
        batch = self._queue.pop(0)
        return sharding.put_batch(batch, self.base.mesh), data.count_tokens(batch, 1), numbers

    def observe(self, metrics: Metrics) -> None:
        """Checks by checksums that the step's gradient was taken at the weights that the sampler used.

        If the step was not finite, drops the rest of its rollout, as the next step on it would most likely not be
        either.

        Raises:
            RuntimeError: the checksums differ.
        """
        if not np.all(metrics[FINITE]):
            self._queue.clear()
        if self._digest is None:
            return
        found = {int(value) for value in np.ravel(metrics["policy_digest"])}
        if found != {self._digest}:
            raise RuntimeError(
                f"the sampler's policy (checksum {self._digest:08x}) is not the one of this step "
                f"({', '.join(f'{value:08x}' for value in sorted(found))})"
            )

    def get_state(self) -> dict[str, Any]:
        """How many prompts were drawn, and what the algorithm keeps from one rollout to the next."""
        return {"drawn": self.drawn, "memory": self.memory}

    def set_state(self, position: dict[str, Any]) -> None:
        """Goes to the position after a rollout."""
        self.drawn, self.memory = position["drawn"], dict(position["memory"])


def describe(rollouts: Rollouts, group_size: int) -> Numbers:
    """The numbers that TRL logs for a rollout: rewards and lengths."""
    lengths = np.array([len(completion.tokens) for completion in rollouts.completions])
    finished = np.array([completion.finished for completion in rollouts.completions])
    terminated = lengths[finished] if finished.any() else np.zeros(1)
    known = [group[~np.isnan(group)] for group in rollouts.rewards.reshape(-1, group_size)]
    deviations = [float(np.std(group, ddof=1)) for group in known if len(group) > 1]
    numbers = {"reward": float(np.mean(np.concatenate(known))) if any(map(len, known)) else math.nan}
    if deviations:
        numbers["reward_std"] = float(np.mean(deviations))
    numbers |= rollouts.table.numbers()
    for kind, of in (("length", lengths), ("terminated_length", terminated)):
        numbers |= {
            f"completions/{name}_{kind}": float(f(of))
            for name, f in (("mean", np.mean), ("min", np.min), ("max", np.max))
        }
    return numbers | {"completions/clipped_ratio": float(1 - finished.mean())}


def log_completions(source: RolloutSource, step: int, rollouts: Rollouts, **values: np.ndarray) -> None:
    """Appends up to `rollout.log_completions` completions to the run's file of them.

    They are evenly spread over the rollout, and come with their rewards and `values`.
    """
    if jax.process_index():
        return
    size, count, prompts = len(rollouts.numbers), source.config.rollout.log_completions, source.prompts
    group = max(1, size // max(1, count))
    with (source.base.workdir / FILE).open("a", encoding="utf-8") as file:
        for index in list(range(0, size, group))[:count]:
            record = {
                "step": step,
                "prompt": prompts.records[rollouts.numbers[index]]["prompt"],
                "completion": rollouts.texts[index],
                "rewards": dict(zip(rollouts.table.names, map(_number, rollouts.table.values[index]), strict=True)),
                **{name: _number(of[index]) for name, of in values.items()},
                **{name: column[index] for name, column in rollouts.table.extra.items()},
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def evaluate(sampler: Sampler, prompts: Prompts, trainable: Params, step: int) -> Numbers:
    """The numbers of `describe` for one completion of each held-out prompt."""
    rollouts = sampler(trainable, prompts, range(len(prompts.items)), seed=(0,), step=step, greedy=True)
    return describe(rollouts, 1)


def _item(prompt: list[int], completion: Completion, index: int, *, trained: bool) -> Item:
    tokens = np.concatenate([np.array(prompt, np.int32), completion.tokens.astype(np.int32)])
    return Item((Example(tokens, (np.arange(len(tokens)) >= len(prompt)) & trained),), {"index": float(index)})


def _keys(seed: tuple[int, ...], count: int) -> jax.Array:
    """A random key for each completion."""
    return jax.random.split(functools.reduce(jax.random.fold_in, seed, jax.random.key(0)), count)


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def join(found: Sequence[Rollouts], on_error: str, group: int, prompts: Prompts) -> Rollouts:
    """Several rollouts of one policy as one.

    With on_error="skip", the rewards of a group whose completions are all empty are NaN; with groups of one, only a
    rollout that is empty as a whole counts as such.

    Raises:
        ValueError: nothing was generated for a whole group (with groups of one: for a whole rollout), and on_error is
            "raise".
    """
    together = found[0] if len(found) == 1 else _joined(found)
    silent = np.array([not text.strip() for text in together.texts]).reshape(-1, group).all(axis=1)
    if group == 1:  # one empty answer is an answer, and is judged
        silent &= silent.all()
    if silent.any() and on_error == "raise":
        asked = [prompts.records[together.numbers[index * group]]["prompt"] for index in np.flatnonzero(silent)]
        raise UserError(
            "nothing was generated for any of the completions of these prompts (the policy stops at once); "
            "rollout.on_error='skip' continues without them; in a new run, a lower optim.learning_rate or a model that "
            "answers helps:\n  " + "\n  ".join(str(prompt)[:200] for prompt in asked)
        )
    rewards = np.where(np.repeat(silent, group), np.nan, together.rewards).astype(np.float32)
    return dataclasses.replace(together, rewards=rewards)


def choose(rollouts: Rollouts, groups: np.ndarray, group: int) -> Rollouts:
    """The given groups of the rollouts, in the given order."""
    rows = [int(number) * group + member for number in groups for member in range(group)]
    return dataclasses.replace(
        rollouts,
        numbers=[rollouts.numbers[row] for row in rows],
        completions=[rollouts.completions[row] for row in rows],
        texts=[rollouts.texts[row] for row in rows],
        items=[dataclasses.replace(rollouts.items[row], values={"index": float(i)}) for i, row in enumerate(rows)],
        table=_rows(rollouts.table, rows),
        rewards=rollouts.rewards[rows],
    )


def with_column(table: RewardTable, name: str, values: np.ndarray, errors: int = 0) -> RewardTable:
    """The table with one more reward, which failed on `errors` completions."""
    return dataclasses.replace(
        table,
        names=(*table.names, name),
        values=np.concatenate([table.values, values[:, None].astype(np.float32)], axis=1),
        errors=(*table.errors, errors),
    )


def _rows(table: RewardTable, rows: list[int]) -> RewardTable:
    extra = {name: [column[row] for row in rows] for name, column in table.extra.items()}
    return dataclasses.replace(table, values=table.values[rows], extra=extra)


def _joined(found: Sequence[Rollouts]) -> Rollouts:
    lists = {
        name: [value for one in found for value in getattr(one, name)]
        for name in ("numbers", "completions", "texts", "items")
    }
    tables = [one.table for one in found]
    logged = {name: [t.metrics[name] for t in tables if name in t.metrics] for t in tables for name in t.metrics}
    columns = dict.fromkeys(name for table in tables for name in table.extra)
    table = dataclasses.replace(
        tables[0],
        values=np.concatenate([table.values for table in tables]),
        errors=tuple(np.sum([table.errors for table in tables], axis=0).tolist()),
        metrics={name: float(np.mean(values)) for name, values in logged.items()},
        extra={
            name: [value for table in tables for value in table.extra.get(name, [None] * len(table.values))]
            for name in columns
        },
    )
    return dataclasses.replace(found[0], **lists, table=table, rewards=np.concatenate([one.rewards for one in found]))
