"""Evaluation during a run with metrics of one's own: texts generated from the held-out prompts, and what they score."""

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
from jlora.errors import UserError, group_faults, raise_all
from jlora.generate import generate
from jlora.train.algorithms.algorithm import Base, Job, Note, Numbers, Plan
from jlora.train.evaluation.records import RESERVED, load_metric, metric_numbers
from jlora.train.rewards.calls import parameters
from jlora.train.rewards.judging import as_messages
from jlora.train.rewards.pyfile import call, load_function
from jlora.train.settings import SharedConfig
from jlora.train.state import TrainState

Planner = Callable[[Any, Any, Note], Plan]

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
        function: called by the names of its parameters.
        path: the file that it is from.
    """

    name: str
    label: str
    function: Callable[..., Any]
    path: str

    def __call__(self, generated: Generated) -> Numbers:
        """The metric's numbers by name, of several the mean.

        Raises:
            UserError: it failed, or returned something else.
        """
        return {name: _mean(found) for name, found in self.values(generated).items()}

    def values(self, generated: Generated) -> dict[str, list[float | None] | float]:
        """What the metric says by name: of each text, None where it says nothing, or of all of them.

        Raises:
            UserError: it failed, or returned something else.
        """
        given = generated.arguments()
        wanted, everything = parameters(self.function)
        arguments = given if everything else {name: given[name] for name in wanted if name in given}
        result = call(self.path, functools.partial(self.function, **arguments))
        named = result if isinstance(result, Mapping) else {self.label: result}
        if wrong := [name for name in named if not isinstance(name, str)]:
            raise UserError(f"{self.name}: returned numbers named {wrong}, expected texts as names")
        return {name: self._checked(value, len(generated.texts)) for name, value in named.items()}

    def faults(self, keys: Collection[str]) -> list[str]:
        """What the function asks for that neither the evaluation nor records with these keys have."""
        needed = [name for name, required in parameters(self.function)[0].items() if required]
        if missing := [name for name in needed if name not in (*GIVEN, *keys)]:
            known = ", ".join((*GIVEN, *sorted(set(keys) - set(GIVEN))))
            return [f"{self.name} wants {missing}, expected parameters among {known}"]
        return []

    def _checked(self, value: Any, count: int) -> list[float | None] | float:
        several = hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0  # 0-d arrays have __len__ too
        wrong = isinstance(value, str | Mapping) or (several and len(value) != count)
        each = [] if wrong else list(value) if several else [value]
        if wrong or not all(one is None or _is_number(one) for one in each):
            raise UserError(
                f"{self.name}: returned {reprlib.repr(value)}, expected a number, a list of one number or None for "
                f"each of {count} texts, or a dict of these"
            )
        found = [None if one is None else float(one) for one in each]
        return found if several else math.nan if found == [None] else found[0]


def scored(
    metric: Metric, records: Sequence[dict[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> tuple[Numbers, list[dict[str, Any]]]:
    """(the metric's numbers, the answers of `evaluate` with what the metric says of each).

    Raises:
        UserError: it failed, returned something else than numbers, or uses a name that is taken.
    """
    columns = ([answer[name] for answer in answers] for name in ("prompt", "text", "target"))
    found = metric.values(Generated(records, *columns))
    if taken := sorted(set(found) & set(RESERVED)):
        raise UserError(f"{metric.name}: returned the names {taken}, expected names other than {RESERVED}")
    each = {name: values for name, values in found.items() if isinstance(values, list)}
    own = [
        {name: values[row] for name, values in each.items() if values[row] is not None} for row in range(len(answers))
    ]
    joined = [{**answer, **more} for answer, more in zip(answers, own, strict=True)]
    return {name: _mean(values) for name, values in found.items()}, joined


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
    return Metric(name, pathlib.Path(path).stem, _of_each(load_metric(path)), path)


def exact_match(texts: Sequence[str], targets: Sequence[str]) -> list[float]:
    """1 for each text that equals its target but for spaces around it, else 0."""
    return [float(text.strip() == target.strip()) for text, target in zip(texts, targets, strict=True)]


def _mean(found: list[float | None] | float) -> float:
    """The mean of those that are not None; a number as it is."""
    if not isinstance(found, list):
        return found
    each = [one for one in found if one is not None]
    return math.fsum(each) / len(each) if each else math.nan


def _is_number(value: Any) -> bool:
    """Whether this is a number, of Python, NumPy, JAX or torch."""
    return isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0


def _of_each(metric: Callable[[dict[str, Any], str], Any]) -> Callable[..., dict[str, list[float | None]]]:
    """A metric(record, text) as a function of all records and texts."""

    def of_all(records: Sequence[dict[str, Any]], texts: Sequence[str]) -> dict[str, list[float | None]]:
        scores, failed = [], []
        for number, (record, text) in enumerate(zip(records, texts, strict=True), start=1):
            try:
                scores.append(metric_numbers(metric, record, text))
            except UserError as error:
                failed.append((f"record {number}", str(error)))
        if failed:
            raise UserError("; ".join(group_faults(failed)))
        names = dict.fromkeys(name for score in scores for name in score)
        return {name: [score.get(name) for score in scores] for name in names}

    return of_all
