"""Reward functions from Python files, from metrics, or given directly, called as TRL calls them."""

import collections
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32

from jlora.errors import UserError, number_of
from jlora.losses.advantages import total
from jlora.train.rewards import pyfile
from jlora.train.rewards.calls import Log, Loop, call_all, name_of, parameters, read

__all__ = ["RewardTable", "Rewards", "TrainerState", "load_rewards", "text_of", "total"]

Messages = list[dict[str, Any]]
Record = dict[str, Any]
Reward = Callable[..., Any]

METRIC = "metric:"
FORMS = "FILE.py, FILE.py:FUNCTION, metric:FILE.py or metric:FILE.py:KEY"
SHOWN_FAULTS = 20
# What a function may be given besides the columns of the records.
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """What rewards may know about the run, under transformers' names: optimizer steps done, and how many there are."""

    global_step: int
    max_steps: int


@dataclasses.dataclass(frozen=True, eq=False)
class RewardTable:
    """What each completion earned from each function.

    Attributes:
        names: the functions' names, [F].
        values: the rewards, NaN where a function gave none.
        errors: the number of completions that each function failed on, [F]; all 0 unless failures are skipped.
        metrics: means of the numbers logged with `log_metric`, by name.
        extra: columns logged with `log_extra`, one value per completion, by name.
    """

    names: tuple[str, ...]
    values: Float32[np.ndarray, "N F"]
    errors: tuple[int, ...]
    metrics: dict[str, float]
    extra: dict[str, list[Any]]

    @property
    def scored(self) -> Bool[np.ndarray, " N"]:
        """Whether any function gave the completion a reward; without one there is nothing to learn from it."""
        return ~np.isnan(self.values).all(axis=1)

    def numbers(self) -> dict[str, float]:
        """`rewards/NAME/mean`, `/std` (n - 1) and `/errors` for the log, and `metrics`, without unknown numbers."""
        numbers = dict(self.metrics)
        for name, column, errors in zip(self.names, self.values.T.astype(np.float64), self.errors, strict=True):
            known = column[~np.isnan(column)]
            numbers |= {f"rewards/{name}/mean": float(known.mean())} if len(known) else {}
            numbers |= {f"rewards/{name}/std": float(known.std(ddof=1))} if len(known) > 1 else {}
            numbers[f"rewards/{name}/errors"] = float(errors)
        return numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Rewards:
    """Reward functions with their names and weights; calling the object scores completions."""

    functions: tuple[Reward, ...]
    names: tuple[str, ...]
    weights: Float32[np.ndarray, " F"]
    on_error: Literal["raise", "skip"] = "raise"

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        *,
        trainer_state: TrainerState | None = None,
    ) -> RewardTable:
        """The rewards of completions.

        If a prompt is a list of messages, its completion's text is passed to the functions as one assistant message.

        Each function is called with those of `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_metric`,
        `log_extra` and the columns that its signature accepts. It returns one number or None for each completion; an
        exception in place of a number means that it failed on that completion. Async functions run concurrently.

        Raises:
            ValueError: the columns do not fit the functions or the completions; with on_error="raise", also all
                failures: exceptions, a wrong number of values, and values that are not finite numbers.
        """
        completions = [as_messages(*pair) for pair in zip(prompts, completions, strict=True)]
        _check_columns(columns, len(completions))
        log = Log(len(completions))
        given = dict(columns) | dict(
            prompts=list(prompts),
            completions=completions,
            completion_ids=[list(ids) for ids in completion_ids],
            trainer_state=trainer_state,
            log_metric=log.metric,
            log_extra=log.extra,
        )
        results = call_all(self._calls(given), lambda: self._loop)
        values, errors = self._read(results, len(completions))
        return RewardTable(self.names, values, errors, log.means(), log.columns)

    def of_records(
        self,
        records: Sequence[Record],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[Sequence[int]],
        *,
        trainer_state: TrainerState | None = None,
        columns: Collection[str] = (),
    ) -> RewardTable:
        """The rewards of one completion for each record: `prompt` is the prompt, all other keys are columns.

        Args:
            columns: further columns that other records of the set have. A column that a record lacks is None for it.
        """
        names = dict.fromkeys(name for record in records for name in record if name != "prompt")
        names |= dict.fromkeys(sorted(columns))
        values = {name: [record.get(name) for record in records] for name in names}
        prompts = [record["prompt"] for record in records]
        return self(prompts, completions, completion_ids, values, trainer_state=trainer_state)

    def require_columns(self, columns: Collection[str]) -> None:
        """Raises UserError if functions have required parameters that are not among the columns."""
        faults = []
        for name, function in zip(self.names, self.functions, strict=True):
            wanted = parameters(function)[0]
            if missing := [key for key, needed in wanted.items() if needed and key not in (*columns, *RESERVED)]:
                known = sorted(set(columns) - set(RESERVED))
                faults.append(f"{name}: wants the columns {missing}, the records have {known}")
        if faults:
            raise UserError("rewards do not fit the records:\n  " + "\n  ".join(faults))

    def _calls(self, given: dict[str, Any]) -> list[Callable[[], Any]]:
        self.require_columns(given)
        calls = []
        for function in self.functions:
            wanted, everything = parameters(function)
            arguments = given if everything else {key: given[key] for key in wanted if key in given}
            calls.append(functools.partial(function, **arguments))
        return calls

    def _read(self, results: list[Any], size: int) -> tuple[Float32[np.ndarray, "N F"], tuple[int, ...]]:
        values = np.full((size, len(results)), np.nan, np.float32)
        errors, faults, causes = [], [], []
        for column, (name, function, result) in enumerate(zip(self.names, self.functions, results, strict=True)):
            values[:, column], failed, found = read(function, result, size)
            errors.append(failed)
            faults += [f"{name}: {fault}" for fault, _ in found]
            causes += [cause for _, cause in found if cause is not None]
        if faults and self.on_error == "raise":
            rest = [f"... and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
            message = "rewards failed:\n  " + "\n  ".join(faults[:SHOWN_FAULTS] + rest)
            raise UserError(message) from (causes[0] if causes else None)
        return values, tuple(errors)

    @functools.cached_property
    def _loop(self) -> Loop:
        return Loop()


def load_rewards(
    names: Sequence[str | Reward],
    weights: Sequence[float | int] | None = None,
    *,
    on_error: Literal["raise", "skip"] = "raise",
) -> Rewards:
    """Reward functions by name, ready to be called; functions of the same name become NAME, NAME_2 and so on.

    Args:
        names: functions, "FILE.py:FUNCTION", "FILE.py" for its function `reward`, "metric:FILE.py:KEY" for what the
            file's metric(record, text) returns under KEY, or "metric:FILE.py" if it returns only one number.
        weights: the rewards' weights in their sum, default 1.
        on_error: "raise", or "skip": a completion that a function fails on gets no reward from it.

    Raises:
        UserError: names cannot be loaded (all are listed), or the number of weights is not that of the names.
    """
    functions, found, faults = [], [], []
    for name in names:
        try:
            function, label = (name, name_of(name)) if callable(name) else _load(name)
        except UserError as error:
            faults.append(error)
            continue
        functions.append(function)
        found.append(label)
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        faults.append(
            UserError(
                f"{number_of(len(weights), 'reward weight')}: expected one for each of "
                f"{number_of(len(names), 'reward')}"
            )
        )
    if faults:
        raise faults[0] if len(faults) == 1 else UserError("\n".join(map(str, faults)))
    counts: collections.Counter = collections.Counter()
    for index, label in enumerate(found):
        counts[label] += 1
        found[index] = f"{label}_{counts[label]}" if counts[label] > 1 else label
    return Rewards(tuple(functions), tuple(found), np.array(weights, np.float32), on_error)


def text_of(completion: str | Messages) -> str:
    """The text of a completion; for messages, that of the last one."""
    return completion if isinstance(completion, str) else completion[-1].get("content") or ""


def as_messages(prompt: str | Messages, completion: str | Messages) -> str | Messages:
    """The completion, as one assistant message if it is the text after a prompt of messages."""
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


class _MetricReward:
    """A metric(record, text) as a reward: what it returns under `key`."""

    def __init__(self, path: str, key: str) -> None:
        self._path, self._key, self._metric = path, key, pyfile.load_function(path, "metric")
        pyfile.require_arguments(path, self._metric, "record", "text")

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | Exception]:
        columns = {"prompt": prompts, **{name: of for name, of in columns.items() if name not in RESERVED}}
        scores: list[float | Exception] = []
        for index, completion in enumerate(completions):
            record = {name: values[index] for name, values in columns.items()}
            try:
                scores.append(self._pick(pyfile.call(self._path, self._metric, record, text_of(completion))))
            except UserError as error:
                scores.append(error)
        return scores

    def _pick(self, found: Any) -> float:
        if not isinstance(found, Mapping):
            raise UserError(f"metric(record, text): found {found!r}, expected a dict of numbers by name")
        if self._key in found:
            return found[self._key]
        if self._key or len(found) != 1:
            wanted = repr(self._key) if self._key else f"only one; name yours: {METRIC}{self._path}:KEY"
            raise UserError(f"metric(record, text): found {sorted(found)}, expected {wanted}")
        return next(iter(found.values()))


def _load(name: str) -> tuple[Reward, str]:
    """The function and its name in the log."""
    match = re.fullmatch(r"(.+\.py)(?::([^:]+))?", name.removeprefix(METRIC))
    if not match:
        raise UserError(f"reward {name!r}: expected {FORMS}")
    path, key = match[1], match[2] or ""
    label = key or pathlib.Path(path).stem
    if name.startswith(METRIC):
        return _MetricReward(path, key), label
    return pyfile.load_function(path, key or "reward"), label


def _check_columns(columns: Mapping[str, Sequence[Any]], size: int) -> None:
    faults = [f"{name}: the name is taken; rename the field" for name in columns if name in RESERVED]
    faults += [
        f"{name}: {number_of(len(values), 'value')}, expected {size}, one for each completion"
        for name, values in columns.items()
        if len(values) != size
    ]
    if faults:
        raise UserError("columns of the records do not fit:\n  " + "\n  ".join(faults))
