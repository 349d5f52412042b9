"""What fine-tuning cost: a tuned model against the one before it, on the task, on general text and on questions."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jlora import data, lora
from jlora.models import Model
from jlora.train.evaluate import RecordSums, record_sums
from jlora.train.metrics import BLUE, GREEN, INK, ORANGE, new_figure, save_figure, style
from jlora.types import Params

SETS = pathlib.Path(data.__file__).parent / "sets"
GENERAL, QUESTIONS = SETS / "general.jsonl", SETS / "questions.jsonl"
RESAMPLES = 2000


class Change(NamedTuple):
    """A measure of both models, and the 95 % interval of its change (over which records there are)."""

    measure: str
    before: float
    after: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def compare(
    model: Model,
    before: Params,
    after: Params,
    tokenizer: Any,
    *,
    task: Sequence[dict[str, Any]] = (),
    general: Sequence[dict[str, Any]] = (),
    questions: Sequence[Mapping[str, Any]] = (),
    scores: tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]] = ({}, {}),
    batch_size: int = 8,
    seq_len: int = 512,
) -> list[Change]:
    """The loss on the task and on general text (nats a token), the share of questions answered right, and `scores`.

    Args:
        task, general: records as for training.
        questions: objects with question, choices and answer (the right one's number); the choice whose text is
            likeliest counts as the answer.
        scores: numbers of each record by name, of both models, that were found elsewhere.
    """
    settings = {"batch_size": batch_size, "seq_len": seq_len}
    changes = []
    for name, records in (("task loss", task), ("general loss", general)):
        if records:
            sums = [record_sums(model, params, tokenizer, records, **settings) for params in (before, after)]
            changes.append(_change(name, *(_ratio(one) for one in sums), len(records)))
    if questions:
        right = [answers(model, params, tokenizer, questions, **settings) for params in (before, after)]
        changes.append(_change("questions right", *(_mean(one) for one in right), len(questions)))
    for name in scores[0]:
        values = [np.asarray(of_model[name], np.float64) for of_model in scores]
        changes.append(_change(name, *(_mean(one) for one in values), len(values[0])))
    return changes


def answers(
    model: Model, params: Params, tokenizer: Any, questions: Sequence[Mapping[str, Any]], **settings: int
) -> Bool[np.ndarray, "N"]:
    """Whether each question's right choice is the one of the greatest log-probability, as a whole text."""
    records = [
        {"prompt": f"Question: {one['question']}\nAnswer:", "completion": f" {choice}"}
        for one in questions
        for choice in one["choices"]
    ]
    likely = -record_sums(model, params, tokenizer, records, **settings).loss
    ends = np.cumsum([len(one["choices"]) for one in questions])
    parts = np.split(likely, ends[:-1])
    return np.array([int(np.argmax(part)) == one["answer"] for part, one in zip(parts, questions, strict=True)])


def read_questions(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The questions of a JSONL file.

    Raises:
        ValueError: lines that are no questions; all are listed.
    """
    found, faults = [], []
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            right = isinstance(one["question"], str) and all(isinstance(text, str) for text in one["choices"])
            right = right and type(one["answer"]) is int and 0 <= one["answer"] < len(one["choices"])
        except (json.JSONDecodeError, KeyError, TypeError):
            right = False
        if right:
            found.append(one)
        else:
            faults.append(f"{path}:{number}: expected question, choices (texts) and answer (the right one's number)")
    if faults or not found:
        raise ValueError("\n".join(faults) or f"{path} holds no questions")
    return found


def sweep(
    model: Model,
    params: Params,
    tokenizer: Any,
    scales: Sequence[int | float],
    *,
    task: Sequence[dict[str, Any]],
    general: Sequence[dict[str, Any]],
    questions: Sequence[Mapping[str, Any]],
    measure: Callable[[Params], Mapping[str, float]] = lambda params: {},
    batch_size: int = 8,
    seq_len: int = 512,
) -> list[dict[str, float]]:
    """The measures at each scale of the adapter: 0 the base, 1 as it was trained.

    Args:
        measure: further numbers about params, as scores of the texts that they give.
    """
    settings = {"batch_size": batch_size, "seq_len": seq_len}
    rows = []
    for scale in scales:
        chosen = lora.scaled(params, scale)
        row = {"scale": float(scale)}
        for name, records in (("task loss", task), ("general loss", general)):
            sums = record_sums(model, chosen, tokenizer, records, **settings)
            row[name] = float(sums.loss.sum() / sums.tokens.sum())
        row["questions right"] = float(answers(model, chosen, tokenizer, questions, **settings).mean())
        rows.append(row | dict(measure(chosen)))
    return rows


def draw_sweep(path: pathlib.Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Writes the plot of a sweep as a PNG: the task beside what the scale costs elsewhere."""
    names = [name for name in rows[0] if name != "scale"]
    figure, axes = new_figure(1, len(names), (3.6 * len(names), 3.4))
    for axis, name, color in zip(axes, names, (BLUE, ORANGE, GREEN) * len(names), strict=False):
        style(axis, name)
        axis.plot([row["scale"] for row in rows], [row[name] for row in rows], "o-", color=color, linewidth=1.6)
        axis.axvline(1, color="#999999", linewidth=0.9, linestyle="--")
        axis.set_xlabel("scale of the adapter", color=INK)
    save_figure(figure, path)


def _change(
    measure: str,
    before: Callable[[np.ndarray], float],
    after: Callable[[np.ndarray], float],
    count: int,
) -> Change:
    """Both values and the percentile bootstrap of their difference (Efron 1979), on the same records each time."""
    everything = np.arange(count)
    draws = np.random.Generator(np.random.PCG64(0)).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile([after(chosen) - before(chosen) for chosen in draws], [2.5, 97.5])
    return Change(measure, before(everything), after(everything), float(low), float(high))


def _ratio(sums: RecordSums) -> Callable[[np.ndarray], float]:
    return lambda chosen: float(sums.loss[chosen].sum() / sums.tokens[chosen].sum())


def _mean(values: Float[np.ndarray, "N"] | Bool[np.ndarray, "N"]) -> Callable[[np.ndarray], float]:
    return lambda chosen: float(values[chosen].mean())
