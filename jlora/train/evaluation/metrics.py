"""Metrics of one's own: what texts score that were generated from held-out prompts during a run, or by `jlora eval`."""

import collections
import dataclasses
import functools
import math
import numbers
import pathlib
import re
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from jlora import data
from jlora.errors import UserError, describe_faults, group_faults, number_of, raise_all
from jlora.generate import generate
from jlora.train.algorithms.algorithm import Base, Job, Note, Numbers, Plan
from jlora.train.evaluation.records import RESERVED, exact_match
from jlora.train.rewards.calls import parameters
from jlora.train.rewards.judging import as_messages
from jlora.train.rewards.pyfile import call, load_function, require_arguments
from jlora.train.settings import SharedConfig
from jlora.train.state import TrainState

Planner = Callable[[Any, Any, Note], Plan]
# What a metric says by name: of each text, None where it says nothing, or of all of them.
Values = dict[str, list[float | None] | float]
Faults = list[tuple[str, str]]  # (where, what)

EXACT_MATCH = "exact_match"
# What a function may ask for by name, besides the records' own keys.
GIVEN = ("texts", "targets", "prompts", "completions", "records")


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a model wrote for each record, and what the record holds."""

    records: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    texts: Sequence[str]
    targets: Sequence[str]

    def arguments(self) -> dict[str, list[Any]]:
        """`GIVEN` and a column for every key of the records, None where a record lacks it."""
        names = dict.fromkeys(name for record in self.records for name in record)
        return {name: [record.get(name) for record in self.records] for name in names} | {
            "texts": list(self.texts),
            "targets": list(self.targets),
            "prompts": list(self.prompts),
            "completions": [as_messages(*pair) for pair in zip(self.prompts, self.texts, strict=True)],
            "records": list(self.records),
        }


def measured(plan: Planner) -> Planner:
    """The plan of an algorithm whose evaluation also measures `train.metrics` on the plan's held-out records."""

    def with_metrics(config: SharedConfig, tokenizer: Any, note: Note) -> Plan:
        measures = load_metrics(config.train.metrics)
        if measures and jax.process_count() > 1:
            raise UserError(f"train.metrics: texts are written on one host so far; found {jax.process_count()}")
        planned = plan(config, tokenizer, note)
        if not measures:
            return planned
        if empty := sum(not data.split_prompt(record)[0] for record in planned.held_out):
            raise UserError(
                f"train.metrics: {empty} of {len(planned.held_out)} held-out records have no prompt to write a text for"
            )
        keys = {key for record in planned.held_out for key in record}
        raise_all(f"train.metrics: {fault}" for measure in measures for fault in measure.faults(keys))
        return _with_measures(config, planned, measures)

    return with_metrics


def _with_measures(config: SharedConfig, planned: Plan, measures: Sequence["Metric"]) -> Plan:
    def replanned(other: SharedConfig) -> tuple[int, Callable[[Base], Job]]:
        found = _with_measures(other, planned.again(other), measures)
        return found.total_steps, found.start

    start = functools.partial(_start, config, planned, measures)
    return dataclasses.replace(planned, start=start, replanned=replanned if planned.replanned else None)


def _start(config: SharedConfig, planned: Plan, measures: Sequence["Metric"], base: Base) -> Job:
    job = planned.start(base)

    def evaluate(state: TrainState) -> Numbers:
        params = next(iter(job.adapters(state.trainable).values()))
        prompts = [data.split_prompt(record)[0] for record in planned.held_out]
        texts = generate(
            base.model,
            params,
            base.tokenizer,
            prompts,
            chat_template_kwargs=list(map(data.template_variables, planned.held_out)),
            max_new_tokens=config.train.metric_tokens,
            batch_size=config.train.batch_size,
        )
        targets = [data.answer_text(record, base.tokenizer) for record in planned.held_out]
        return join(job.evaluate(state), measures, Generated(planned.held_out, prompts, texts, targets))

    return dataclasses.replace(job, evaluate=evaluate)


def join(numbers: Numbers, measures: Sequence["Metric"], generated: Generated) -> Numbers:
    """The numbers and those of the metrics.

    Raises:
        UserError: metrics failed, returned something else than numbers, or use a name that is taken; all are listed.
    """
    found, faults = dict(numbers), []
    for measure in measures:
        try:
            more = measure(generated)
        except UserError as error:
            faults.append(str(error))
            continue
        faults += [f"{measure.name}: the name {name!r} is taken; choose another" for name in more if name in found]
        found |= more
    if faults:
        raise UserError("train.metrics failed:\n  " + "\n  ".join(faults))
    return found


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of one's own.

    Attributes:
        name: as a setting or an option names it.
        label: names a number that comes without a name.
        function: of all texts, called by the names of its parameters; with `each`, called with a record and its text.
        path: the file that it is from.
    """

    name: str
    label: str
    function: Callable[..., Any]
    path: str
    each: bool = False

    def __call__(self, generated: Generated) -> Numbers:
        """The metric's numbers by name, of several the mean.

        Raises:
            UserError: it failed, or returned something else.
        """
        values, failed = self.values(generated)
        if failed:
            raise UserError("; ".join(group_faults(failed)))
        return {name: _mean(found) for name, found in values.items()}

    def values(self, generated: Generated) -> tuple[Values, Faults]:
        """(what the metric says, where it failed or returned something else, and how)."""
        if self.each:
            return _of_each(self.function, generated)
        try:
            return self._of_all(generated), []
        except UserError as error:
            return {}, [(self.name, str(error))]

    def _of_all(self, generated: Generated) -> Values:
        given = generated.arguments()
        wanted, everything = parameters(self.function)
        arguments = given if everything else {name: given[name] for name in wanted if name in given}
        result = call(self.path, functools.partial(self.function, **arguments))
        named = result if isinstance(result, Mapping) else {self.label: result}
        if wrong := [name for name in named if not isinstance(name, str)]:
            raise UserError(f"returned numbers named {wrong}, expected texts as names")
        return {name: _checked(value, len(generated.texts)) for name, value in named.items()}

    def faults(self, keys: Collection[str]) -> list[str]:
        """What the function asks for that neither the evaluation nor records with these keys have."""
        needed = [] if self.each else [name for name, required in parameters(self.function)[0].items() if required]
        if missing := [name for name in needed if name not in (*GIVEN, *keys)]:
            known = ", ".join((*GIVEN, *sorted(set(keys) - set(GIVEN))))
            return [f"{self.name} wants {missing}, expected parameters among {known}"]
        return []


class MetricFailed(UserError):
    """A metric failed on some of the answers; everything else that was computed is kept.

    Attributes:
        numbers, answers: as `scored` returns them, without the metric's values where it failed.
    """

    def __init__(self, faults: Faults, numbers: Numbers, answers: list[dict[str, Any]]) -> None:
        super().__init__(describe_faults("the metric failed", group_faults(faults)))
        self.numbers, self.answers = numbers, answers


def scored(
    metric: Metric, records: Sequence[dict[str, Any]], numbers: Numbers, answers: Sequence[Mapping[str, Any]]
) -> tuple[Numbers, list[dict[str, Any]]]:
    """What `evaluate` returned of these records, with the metric's numbers and what it says of each answer.

    Raises:
        MetricFailed: it failed, returned something else than numbers, or uses a name that is taken.
    """
    columns = ([answer[name] for answer in answers] for name in ("prompt", "text", "target"))
    values, failed = metric.values(Generated(records, *columns))
    if taken := sorted(set(values) & set(RESERVED)):
        failed.append((metric.name, f"returned the names {taken}, expected names other than {RESERVED}"))
        values = {}
    each = {name: found for name, found in values.items() if isinstance(found, list)}
    answers = [
        {**answer, **{name: found[row] for name, found in each.items() if found[row] is not None}}
        for row, answer in enumerate(answers)
    ]
    numbers = {**numbers, **{name: _mean(found) for name, found in values.items()}}
    if failed:
        raise MetricFailed(failed, numbers, answers)
    return numbers, answers


def load_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics: "exact_match", "FILE.py:FUNCTION", or "FILE.py" for its metric(record, text), as in `jlora eval`.

    Raises:
        UserError: some cannot be loaded, or two have one name; all are listed.
    """
    metrics, faults = [], []
    for name in names:
        try:
            metrics.append(load(name))
        except UserError as error:
            faults.append(f"train.metrics: {error}")
    counts = collections.Counter(metric.label for metric in metrics)
    faults += [f"train.metrics: two are called {label}; rename one" for label, count in counts.items() if count > 1]
    raise_all(faults)
    return metrics


def load(name: str) -> Metric:
    """The metric that is called so (see `load_metrics`).

    Raises:
        UserError: it cannot be loaded.
    """
    if name == EXACT_MATCH:
        return Metric(name, name, exact_match, name)
    match = re.fullmatch(r"(.+\.py)(?::(\w+))?", name)
    if not match:
        raise UserError(f"found {name!r}, expected {EXACT_MATCH}, FILE.py:FUNCTION or FILE.py")
    path, function = match[1], match[2]
    if function:
        return Metric(name, function, load_function(path, function), path)
    return Metric(name, pathlib.Path(path).stem, _load_metric(path), path, each=True)


def _checked(value: Any, count: int) -> list[float | None] | float:
    """What a function of all texts returned under a name."""
    several = hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0  # 0-d arrays have __len__ too
    wrong = isinstance(value, str | Mapping) or (several and len(value) != count)
    each = [] if wrong else list(value) if several else [value]
    if wrong or not all(one is None or _is_number(one) for one in each):
        raise UserError(
            f"returned {reprlib.repr(value)}, expected a number, a list of one number or None for each of "
            f"{number_of(count, 'text')}, or a dict of these"
        )
    found = [None if one is None else float(one) for one in each]
    return found if several else math.nan if found == [None] else found[0]


def _mean(found: list[float | None] | float) -> float:
    """The mean of those that are not None; a number as it is."""
    if not isinstance(found, list):
        return found
    each = [one for one in found if one is not None]
    return math.fsum(each) / len(each) if each else math.nan


def _is_number(value: Any) -> bool:
    """Whether this is a number, of Python, NumPy, JAX or torch."""
    return isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0


def _load_metric(path: str) -> Callable[[dict[str, Any], str], Any]:
    """The function `metric` of a Python file; any error it raises when called becomes a UserError with file and line.

    Raises:
        UserError: there is no such file, it cannot be run, or its function `metric` is missing or takes other
            arguments.
    """
    metric = load_function(path, "metric")
    require_arguments(path, metric, "record", "text")

    @functools.wraps(metric)
    def called(record: dict[str, Any], text: str) -> Any:
        return call(path, metric, record, text)

    return called


def _of_each(metric: Callable[[dict[str, Any], str], Any], generated: Generated) -> tuple[Values, Faults]:
    """The values of a metric(record, text), and the records that it failed on."""
    scores: list[dict[str, float]] = []
    failed: Faults = []
    for number, (record, text) in enumerate(zip(generated.records, generated.texts, strict=True), start=1):
        try:
            scores.append(_numbers(metric(record, text)))
        except UserError as error:
            scores.append({})
            failed.append((f"record {number}", str(error)))
    names = dict.fromkeys(name for score in scores for name in score)
    return {name: [score.get(name) for score in scores] for name in names}, failed


def _numbers(found: Any) -> dict[str, float]:
    """What a metric(record, text) returned."""
    if not isinstance(found, Mapping) or not all(isinstance(value, int | float) for value in found.values()):
        raise UserError(f"metric(record, text): found {found!r}, expected a dict of numbers by name")
    return {name: float(value) for name, value in found.items()}
