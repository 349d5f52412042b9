"""The prompts of a run that samples their completions, and what judges these; nothing is sampled yet."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jlora import data
from jlora.errors import UserError
from jlora.train.algorithms.algorithm import Note
from jlora.train.rewards.judging import Rewards, load_rewards
from jlora.train.rewards.tasks import reasoning_tasks
from jlora.train.settings import TASK, SharedConfig

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A set of prompts, as the records that rewards see and as tokens."""

    records: tuple[Record, ...]
    tokens: tuple[list[int], ...]
    columns: frozenset[str] = frozenset()  # all columns that any record of the set has

    @property
    def checksum(self) -> str:
        """A checksum of the tokens, as eight hex digits."""
        rows = [f"{np.asarray(tokens).tolist()}" for tokens in self.tokens]
        return f"{zlib.crc32(chr(10).join(rows).encode()):08x}"

    def order(self, seed: int, first: int, count: int) -> list[int]:
        """The prompts at positions `first` to `first + count - 1` of an endless shuffled order.

        Each prompt comes once per epoch.
        """
        size = len(self.records)
        chosen = []
        for number in range(first, first + count):
            epoch, place = divmod(number, size)
            chosen.append(int(_permutation(size, seed, epoch)[place]))
        return chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Judges:
    """What judges completions: all rewards by name, including a task's own, and those that are functions."""

    names: tuple[Any, ...]
    functions: Rewards


def read_prompts(config: SharedConfig, tokenizer: Any, note: Note) -> tuple[Prompts, Prompts | None, Judges]:
    """The training prompts, the held-out ones if any, and the rewards.

    Raises:
        UserError: there are several processes, settings do not apply, or prompts or rewards are invalid or do not fit
            each other.
    """
    if jax.process_count() > 1:
        raise UserError(f"{config.algorithm} samples on one host so far; found {jax.process_count()} processes")
    settings = config.rollout
    names: list = list(settings.rewards)
    if config.data.path.startswith(TASK):
        name = config.data.path.removeprefix(TASK)
        train, held_out, reward = reasoning_tasks(
            name,
            size=settings.task_size,
            held_out=settings.eval_size if config.train.eval_every else 0,
            seed=config.train.seed,
            system_prompt=settings.system_prompt,
            num_fewshot=settings.num_fewshot,
            **dict(settings.task_settings),
        )
        names = [reward if given == "reasoning_gym" else given for given in names or ["reasoning_gym"]]
    else:
        if settings.system_prompt or settings.num_fewshot:
            raise UserError(
                "rollout.system_prompt and num_fewshot are for tasks; the prompts of data.path bring their own"
            )
        read = functools.partial(data.read_prompts, on_error=config.data.on_error, note=note)
        train = read(config.data.path)
        held_out = read(config.data.eval_path)[: settings.eval_size] if config.data.eval_path else []
    judges = _judges(config, names, [train, held_out])
    room = config.train.seq_len - settings.max_completion_length
    prompts = _encode(train, tokenizer, room, config.data, note)
    note(f"{len(prompts.records)} prompts of up to {max(map(len, prompts.tokens))} tokens")
    return prompts, _encode(held_out, tokenizer, room, config.data, note) if held_out else None, judges


def _judges(config: SharedConfig, names: Sequence[Any], sets: Sequence[Sequence[Record]]) -> Judges:
    weights = config.rollout.reward_weights or (1.0,) * len(names)
    functions = load_rewards(
        [name for name in names if name != "model"],
        [weight for name, weight in zip(names, weights, strict=True) if name != "model"],
        on_error=config.rollout.on_error,
    )
    for records in filter(None, sets):
        functions.require_columns(_columns(records))
    return Judges(tuple(names), functions)


def _columns(records: Sequence[Record]) -> frozenset[str]:
    return frozenset(name for record in records for name in record if name != "prompt")


def _encode(records: Sequence[Record], tokenizer: Any, room: int, settings: data.DataConfig, note: Note) -> Prompts:
    if settings.overlong == "cut":
        raise UserError('data.overlong="cut" would cut questions: expected "drop" or "error" for prompts')
    tokens, report = data.encode_prompts(
        records, tokenizer, room, overlong=settings.overlong, on_error=settings.on_error, note=note
    )
    if report.dropped:
        note(f"{report.dropped} prompts of more than {room} tokens are left out")
    kept = data.with_answers([records[index] for index in report.kept], tokenizer)
    return Prompts(tuple(kept), tuple(tokens), _columns(records))


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, size]))).permutation(size)
