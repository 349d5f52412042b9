"""reasoning-gym's tasks by name: random questions to train on and to hold out, and the reward for answers."""

import difflib
import itertools
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jlora.errors import UserError
from jlora.train.rewards.judging import Messages, Record, text_of
from jlora.train.rewards.pyfile import ERRORS
from jlora.types import require

SYSTEM_PROMPT = (
    "Work out the answer step by step, then give it between <answer> and </answer>. "
    "Put nothing but the answer inside the tags, in the form that the question asks for."
)
# What a task's scorer raises for an answer of a form that it did not expect.
UNREADABLE = (
    SyntaxError,
    NameError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RecursionError,
)
# How many times the number of held-out questions is drawn, before the task is found to have too few different ones.
DRAWS = 20


class TaskSet(NamedTuple):
    """Questions to train on, others to hold out, and the reward for both."""

    train: list[Record]
    held_out: list[Record]
    reward: "TaskReward"


def reasoning_tasks(
    name: str,
    *,
    size: int,
    seed: int,
    held_out: int = 0,
    system_prompt: str | None = None,
    num_fewshot: int = 0,
    **settings: Any,
) -> TaskSet:
    """Questions of reasoning-gym's task `name`, always the same ones for the same arguments.

    A record is {"prompt": [system, …, user], "answer", "task", "index"}: the answer is reasoning-gym's own, or None if
    the task only checks answers; the index identifies the question for the reward. Training questions may repeat if the
    task has few; held-out ones are all different, and none of them is trained on.

    Args:
        system_prompt: None uses `SYSTEM_PROMPT`; "" leaves the system message out.
        num_fewshot: how many other questions, solved, precede each question as user and assistant turns.
        settings: the task's own, as documented by reasoning-gym.

    Raises:
        ValueError: there is no such task, it refuses the settings, it has too few different questions to hold out, or
            it has no answers to show with the few-shot questions.
    """
    _check_name(name)
    entries = list(_draw(name, f"{seed}/train", size, settings))
    shown = list(_draw(name, f"{seed}/solved", num_fewshot, settings))
    if any(entry["answer"] is None for entry in shown):
        raise UserError(f"reasoning-gym task {name!r} checks answers but has none to show: expected num_fewshot=0")
    seen = {_plain(entry) for entry in entries + shown}
    others = itertools.chain.from_iterable(
        _draw(name, f"{seed}/held out/{part}", held_out, settings) for part in range(DRAWS)
    )
    while len(entries) < size + held_out:
        entry = next(others, None)
        if entry is None:
            raise UserError(
                f"reasoning-gym task {name!r}: only {len(entries) - size} of {DRAWS * held_out} questions to hold out "
                f"are not among the {size} to train on, expected {held_out}: take fewer, or settings that allow more"
            )
        if _plain(entry) not in seen:
            seen.add(_plain(entry))
            entries.append(entry)
    system = SYSTEM_PROMPT if system_prompt is None else system_prompt
    before = [{"role": "system", "content": system}] if system else []
    for entry in shown:
        before += [
            {"role": "user", "content": entry["question"]},
            {"role": "assistant", "content": _solution(str(entry["answer"]), system)},
        ]
    records = [_record(name, index, entry, before) for index, entry in enumerate(entries)]
    scorer = _dataset(name, f"{seed}/train", 1, settings)
    return TaskSet(records[:size], records[size:], TaskReward(name, scorer, entries))


class TaskReward:
    """The task's own score, 0 to 1, for answers to its questions; None for records of other tasks.

    The answer is the content of the last <answer>…</answer> in a completion (`reasoning_gym.utils.extract_answer`) or,
    without such tags, the whole text, in both cases without surrounding spaces. An answer that the task cannot read
    scores 0.

    Some of reasoning-gym's tasks read answers with Python's eval (0.1.25: string_insertion, spiral_matrix,
    binary_matrix, and through SymPy those of algebra), which runs what the model writes: use them in a sandbox.
    """

    def __init__(self, name: str, scorer: Any, entries: list[dict[str, Any]]) -> None:
        self.__name__ = name
        self._scorer, self._entries = scorer, entries

    def __call__(
        self, prompts: list[str | Messages], completions: list[str | Messages], task: list, index: list, **_: Any
    ) -> list[float | Exception | None]:
        """One score for each completion; an exception for a record that is not of this set of questions."""
        return [
            self._score(text_of(prompt), text_of(completion), number) if name == self.__name__ else None
            for prompt, completion, name, number in zip(prompts, completions, task, index, strict=True)
        ]

    def _score(self, prompt: str, completion: str, index: int) -> float | Exception:
        if not 0 <= index < len(self._entries) or self._entries[index]["question"] not in prompt:
            return ValueError(f"question {index} of {self.__name__!r} is another one in the set that this reward is of")
        answer = require("reasoning_gym.utils", "tasks").extract_answer(completion)
        try:
            return float(
                self._scorer.score_answer(completion.strip() if answer is None else answer, self._entries[index])
            )
        except UNREADABLE:
            return 0.0


def _draw(name: str, seed: str, size: int, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if size:
        dataset = _dataset(name, seed, size, settings)
        yield from (dataset[index] for index in range(size))


def _dataset(name: str, seed: str, size: int, settings: dict[str, Any]) -> Any:
    # A question is determined by seed + index, so neighbouring seeds would share all their questions but one.
    number = zlib.crc32(f"{name}/{seed}".encode())
    create = require("reasoning_gym", "tasks").create_dataset
    try:
        return create(name, seed=number, size=size, **settings)
    except MemoryError:
        raise
    except ERRORS as error:
        raise UserError(f"reasoning-gym task {name!r} with {settings}: {type(error).__name__}: {error}") from error


def _check_name(name: str) -> None:
    known = require("reasoning_gym.factory", "tasks").DATASETS
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        words = f"did you mean {', '.join(close)}?" if close else f"expected one of {', '.join(sorted(known))}"
        raise UserError(f"reasoning-gym has no task {name!r}; {words}")


def _solution(answer: str, system_prompt: str) -> str:
    """The answer in the form that the system prompt asks for."""
    return f"<answer>{answer}</answer>" if "<answer>" in system_prompt else answer


def _record(name: str, index: int, entry: dict[str, Any], before: Messages) -> Record:
    prompt = [*before, {"role": "user", "content": entry["question"]}]
    return {"prompt": prompt, "answer": entry["answer"], "task": name, "index": index}


def _plain(entry: dict[str, Any]) -> str:
    return " ".join(entry["question"].split())
