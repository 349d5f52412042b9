"""The prompts of a run that samples their completions, and what judges these; nothing is sampled yet."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jlora import data
from jlora.data.mixing import generator, mixed
from jlora.errors import UserError, number_of
from jlora.train.algorithms import files
from jlora.train.algorithms.algorithm import Encoded, Note
from jlora.train.rewards.judging import Rewards, load_rewards
from jlora.train.rewards.tasks import reasoning_tasks
from jlora.train.settings import SharedConfig

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A set of prompts.

    Attributes:
        items: each prompt's tokens as one document.
        records: what rewards see of each. Those of a file are parsed again whenever they are asked for.
        columns: all columns that any record of the set has.
        counts, weights: of a mixture's sources: how many prompts come from each, and its share of those of an epoch.
        encoded: what became of the data; None for those of a task.
    """

    items: data.Items
    records: Sequence[Record]
    columns: frozenset[str] = frozenset()
    counts: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    encoded: Encoded | None = None

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt."""
        return int(self.items.lengths.max())

    @property
    def checksum(self) -> str:
        """A checksum of the tokens, as eight hex digits."""
        return self.items.examples.checksum

    def tokens(self, number: int) -> list[int]:
        """The tokens of a prompt."""
        return self.items.examples[number].tokens.tolist()

    def order(self, seed: int, first: int, count: int) -> list[int]:
        """The prompts at positions `first` to `first + count - 1` of an endless shuffled order.

        Each prompt comes once per epoch, or as often as the weight of its source says.
        """
        size = len(self.items)
        chosen = []
        for number in range(first, first + count):
            epoch, place = divmod(number, size)
            chosen.append(int(_permutation(size, seed, epoch, self.counts, self.weights)[place]))
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
    if config.task is not None:
        train, held_out, reward = reasoning_tasks(
            config.task,
            size=settings.task_size,
            held_out=settings.eval_size if config.train.eval_every else 0,
            seed=config.train.seed,
            system_prompt=settings.system_prompt,
            num_fewshot=settings.num_fewshot,
            **dict(settings.task_settings),
        )
        names = [reward if given == "reasoning_gym" else given for given in names or ["reasoning_gym"]]
        sets = [_encode_task(config, tokenizer, note, some) for some in (train, held_out) if some]
    else:
        if settings.system_prompt or settings.num_fewshot:
            raise UserError(
                "rollout.system_prompt and num_fewshot are for tasks; the prompts of data.path bring their own"
            )
        sets = [_encode_file(config, tokenizer, note, config.data.train, None)]
        files.require_all_sources(config, sets[0].encoded.report)
        if config.data.evaluation:
            sets.append(_encode_file(config, tokenizer, note, config.data.evaluation, settings.eval_size))
    judges = _judges(config, names, sets)
    prompts, held_out = [*sets, None][:2]
    note(f"{number_of(len(prompts.items), 'prompt')} of up to {number_of(prompts.longest, 'token')}")
    return prompts, held_out, judges


def _judges(config: SharedConfig, names: Sequence[Any], sets: Sequence[Prompts]) -> Judges:
    weights = config.rollout.reward_weights or (1.0,) * len(names)
    functions = load_rewards(
        [name for name in names if name != "model"],
        [weight for name, weight in zip(names, weights, strict=True) if name != "model"],
        on_error=config.rollout.on_error,
    )
    for prompts in sets:
        functions.require_columns(prompts.columns)
    return Judges(tuple(names), functions)


def _encode_file(config: SharedConfig, tokenizer: Any, note: Note, sources: data.Sources, most: int | None) -> Prompts:
    """The prompts of sources, or the first of them, from the cache if they are there."""
    on_error = config.data.on_error

    def encode(writer: data.Writer, note: Note, progress: data.Progress) -> tuple[data.Items, data.EncodeReport]:
        records = data.iterate_prompts(sources, on_error=on_error, note=note)
        return _encode(config, tokenizer, _first(records, most), note, writer=writer, progress=progress)

    key = {"room": _room(config), "overlong": config.data.overlong, "on_error": on_error, "most": most}
    items, report = files.encoded(config, sources, tokenizer, key, encode, note, what="prompts")
    return _prompts(config, items, items.records, report, note)


def _encode_task(config: SharedConfig, tokenizer: Any, note: Note, records: Sequence[Record]) -> Prompts:
    """The prompts of a task; its scorer is given the very records that it made."""
    items, report = _encode(config, tokenizer, records, note)
    return _prompts(config, items, [records[index] for index in report.kept], report, note)


def _first(records: Iterator[Record], count: int | None) -> Iterator[Record]:
    """The first records; all are read, so that what is wrong with any is said."""
    yield from itertools.islice(records, count)
    collections.deque(records, maxlen=0)


def _encode(
    config: SharedConfig, tokenizer: Any, records: Iterable[Record], note: Note, **settings: Any
) -> tuple[data.Items, data.EncodeReport]:
    if config.data.overlong == "cut":
        raise UserError('data.overlong="cut" would cut questions: expected "drop" or "error" for prompts')
    settings |= dict(overlong=config.data.overlong, on_error=config.data.on_error, note=note)
    return data.encode_prompts(records, tokenizer, _room(config), **settings)


def _room(config: SharedConfig) -> int:
    """The most tokens of a prompt."""
    return config.train.seq_len - config.rollout.max_completion_length


def _prompts(
    config: SharedConfig, items: data.Items, records: Sequence[Record], report: data.EncodeReport, note: Note
) -> Prompts:
    if report.dropped:
        note(f"left out: {number_of(report.dropped, 'prompt')} of more than {number_of(_room(config), 'token')}")
    columns, weights = frozenset(report.columns), config.data.train.weights
    return Prompts(items, records, columns, report.sources, weights, Encoded(items, report, ()))


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int, counts: tuple[int, ...], weights: tuple[float, ...]) -> np.ndarray:
    if weights:
        return generator(seed, epoch, 0).permutation(mixed(counts, weights, seed, epoch))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, size]))).permutation(size)
