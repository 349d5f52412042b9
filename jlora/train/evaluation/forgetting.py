"""What fine-tuning cost: a model before and after it, compared on the task, on general text and on questions."""

import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jlora import data, lora
from jlora.data.notes import Note, warn
from jlora.data.records import Accepted, read_rows
from jlora.errors import UserError, number_of
from jlora.models import Model
from jlora.train.evaluation.records import RecordSums, encode_each, example_sums, record_sums
from jlora.train.reporting.metrics import BLUE, GREEN, INK, ORANGE, new_figure, save_figure, style
from jlora.types import Params

SETS = pathlib.Path(data.__file__).parent / "sets"
GENERAL, QUESTIONS = SETS / "general.jsonl", SETS / "questions.jsonl"
RESAMPLES = 2000
# Long enough to cut no text.
UNCUT = sys.maxsize


class Change(NamedTuple):
    """A measure of both models, and the 95 % interval of its change, as records vary.

    The interval is NaN to NaN for a single record or for values that are not finite.

    Attributes:
        n: records that it covers.
        dropped: records that it leaves out, as they have no completion token within `seq_len` or lack this score.
    """

    measure: str
    before: float
    after: float
    low: float
    high: float
    n: int
    dropped: int

    @property
    def is_clear(self) -> bool:
        """Whether there is an interval and it excludes 0."""
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
    batch_size: int = 8,
    seq_len: int = 512,
) -> list[Change]:
    """The changes of the losses (nats per token) on the task and on general text, and of the share of right answers.

    Completions of the task are scored with the end-of-text token after them, as in training. General text and choices
    are scored on their own tokens only, as in lm-evaluation-harness: a tuned model that ends its texts elsewhere has
    not forgotten anything.

    Args:
        task, general: records as for training; those whose completion begins after `seq_len` count for neither model.
        questions: objects with question, choices and answer (the index of the right choice). The likeliest choice
            counts as the model's answer; if its likelihood is not finite, the question counts as wrong.

    Raises:
        ValueError: questions are longer than `seq_len` (all are listed), or no completion has a token within it.
    """
    settings = {"batch_size": batch_size, "seq_len": seq_len}
    choices = encode_choices(data.fitted(tokenizer, model.config.vocab_size), questions, seq_len=seq_len)
    changes = []
    for name, records, end in (("task loss", task, True), ("general loss", general, False)):
        if records:
            sums = [record_sums(model, params, tokenizer, records, end=end, **settings) for params in (before, after)]
            kept = np.flatnonzero(sums[0].tokens)
            changes.append(_change(name, *(_ratio(one) for one in sums), kept, len(records)))
    if questions:
        right = [_right(model, params, questions, choices, **settings) for params in (before, after)]
        everything = np.arange(len(questions))
        changes.append(_change("questions right", *(_mean(one) for one in right), everything, len(questions)))
    return changes


def compare_scores(
    before: Sequence[Mapping[str, int | float]], after: Sequence[Mapping[str, int | float]]
) -> list[Change]:
    """The change of each score's mean, over the records that have the score from both models.

    Args:
        before, after: for each record, numbers by name.
    """
    changes = []
    for name in dict.fromkeys(name for record in (*before, *after) for name in record):
        kept = [place for place, pair in enumerate(zip(before, after, strict=True)) if all(name in one for one in pair)]
        values = [np.array([record.get(name, np.nan) for record in of_model]) for of_model in (before, after)]
        if kept:
            changes.append(_change(name, *(_mean(one) for one in values), np.array(kept), len(before)))
    return changes


def answers(
    model: Model,
    params: Params,
    tokenizer: Any,
    questions: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    seq_len: int = 512,
) -> Bool[np.ndarray, "N"]:
    """Whether the right choice of each question has the greatest log-probability.

    It is summed over the choice's own tokens, without an end of text.

    Raises:
        ValueError: questions are longer than `seq_len`; all are listed.
    """
    choices = encode_choices(data.fitted(tokenizer, model.config.vocab_size), questions, seq_len=seq_len)
    return _right(model, params, questions, choices, batch_size=batch_size, seq_len=seq_len)


def encode_choices(tokenizer: Any, questions: Sequence[Mapping[str, Any]], *, seq_len: int) -> list[data.Example]:
    """The tokens of every question with each of its choices, in order, without an end of text.

    Raises:
        ValueError: questions are longer than `seq_len` together with a choice, or have a choice without a token of its
            own; all are listed.
    """
    records = [
        {"prompt": f"Question: {one['question']}\nAnswer:", "completion": f" {choice}"}
        for one in questions
        for choice in one["choices"]
    ]
    found = encode_each(records, tokenizer, seq_len=UNCUT, end=False) if records else []
    faults, start = [], 0
    for number, one in enumerate(questions, start=1):
        own = found[start : start + len(one["choices"])]
        start += len(own)
        if None in own:
            faults.append(f"question {number}: choice {own.index(None)} has no token of its own")
        elif (longest := max(len(example.tokens) for example in own)) > seq_len:
            faults.append(f"question {number}: {longest} tokens with its longest choice")
    if faults:
        raise UserError(
            f"{len(faults)} of {number_of(len(questions), 'question')} cannot be answered within seq_len={seq_len}; "
            "raise it, or leave them out:\n  " + "\n  ".join(faults)
        )
    return found


def _right(
    model: Model,
    params: Params,
    questions: Sequence[Mapping[str, Any]],
    choices: Sequence[data.Example],
    **settings: int,
) -> Bool[np.ndarray, "N"]:
    likely = -example_sums(model, params, choices, **settings).loss
    ends = np.cumsum([len(one["choices"]) for one in questions])
    parts = np.split(likely, ends[:-1])
    return np.array(
        [
            bool(np.isfinite(part.max()) and np.argmax(part) == one["answer"])
            for part, one in zip(parts, questions, strict=True)
        ]
    )


def read_questions(
    path: str | pathlib.Path, *, on_error: data.OnError = "raise", note: Note = warn
) -> list[dict[str, Any]]:
    """The questions of a file (see `data.records.read_rows`).

    Raises:
        UserError: there is no such file, or rows are not questions; all are listed.
    """
    return read_rows(
        path, _accept_question, "an object with question, choices and answer", on_error=on_error, note=note
    )


def _accept_question(row: Any) -> Accepted:
    right = isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("choices"), list)
    right = right and all(isinstance(text, str) for text in row["choices"])
    if right and type(row.get("answer")) is int and 0 <= row["answer"] < len(row["choices"]):
        return Accepted([row], [])
    return Accepted([], ["expected question, choices (texts) and answer (the right one's number)"])


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
    """The measures at each scale of the adapter: 0 is the base, 1 the adapter as trained.

    `dropped` says how many records the losses leave out because their completions begin after `seq_len`.

    Args:
        measure: (params) → further numbers about them, such as scores of generated texts.

    Raises:
        ValueError: as in `compare`, or the adapter's updates have no scale.
    """
    settings = {"batch_size": batch_size, "seq_len": seq_len}
    choices = encode_choices(data.fitted(tokenizer, model.config.vocab_size), questions, seq_len=seq_len)
    rows = []
    for scale in scales:
        chosen = lora.scaled(params, scale)
        row = {"scale": float(scale), "dropped": 0.0}
        for name, records, end in (("task loss", task, True), ("general loss", general, False)):
            sums = record_sums(model, chosen, tokenizer, records, end=end, **settings)
            row[name] = float(sums.loss.sum() / sums.tokens.sum())
            row["dropped"] += float(np.sum(sums.tokens == 0))
        row["questions right"] = float(_right(model, chosen, questions, choices, **settings).mean())
        rows.append(row | dict(measure(chosen)))
    return rows


def draw_sweep(path: pathlib.Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Writes the plot of a sweep as a PNG, one panel per measure; numbers that a row does not have are gaps."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("scale", "dropped")]
    figure, axes = new_figure(1, len(names), (3.6 * len(names), 3.4))
    for axis, name, color in zip(axes, names, (BLUE, ORANGE, GREEN) * len(names), strict=False):
        style(axis, name)
        values = [row.get(name, math.nan) for row in rows]
        axis.plot([row["scale"] for row in rows], values, "o-", color=color, linewidth=1.6)
        axis.axvline(1, color="#999999", linewidth=0.9, linestyle="--")
        axis.set_xlabel("scale of the adapter", color=INK)
    save_figure(figure, path)


def _change(
    measure: str,
    before: Callable[[np.ndarray], float],
    after: Callable[[np.ndarray], float],
    kept: Int[np.ndarray, "M"],
    count: int,
) -> Change:
    """Both values and the percentile bootstrap interval of their difference (Efron 1979).

    The same records are resampled for both.

    Args:
        kept: the indices of the records that count, among `count`.
    """
    values = before(kept), after(kept)
    low = high = math.nan
    if len(kept) > 1 and all(map(math.isfinite, values)):
        draws = np.random.Generator(np.random.PCG64(0)).integers(0, len(kept), (RESAMPLES, len(kept)))
        low, high = np.percentile([after(kept[chosen]) - before(kept[chosen]) for chosen in draws], [2.5, 97.5])
    return Change(measure, *values, float(low), float(high), len(kept), count - len(kept))


def _ratio(sums: RecordSums) -> Callable[[np.ndarray], float]:
    return lambda chosen: float(sums.loss[chosen].sum() / sums.tokens[chosen].sum())


def _mean(values: Float[np.ndarray, "N"] | Bool[np.ndarray, "N"]) -> Callable[[np.ndarray], float]:
    return lambda chosen: float(values[chosen].mean())
