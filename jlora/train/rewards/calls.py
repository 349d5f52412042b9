"""Calling reward functions: what their signatures accept, running async ones together, and reading what they return."""

import asyncio
import collections
import functools
import inspect
import json
import reprlib
import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from jlora.errors import UserError, number_of
from jlora.train.rewards import pyfile

Fault = tuple[str, BaseException | None]

# Names that are always logged for a completion and for a step, which functions therefore may not use.
COLUMNS = ("step", "prompt", "completion", "rewards", "reward", "advantage", "score")
NUMBERS = ("step", "loss", "reward", "reward_std", "kl", "entropy", "grad_norm", "learning_rate", "num_tokens")


def parameters(function: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """The parameters by name with whether each is required, and whether the function accepts any others."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some C functions have no signature to show
        return {}, True
    named = {p.name: p.default is p.empty for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in found)


def name_of(function: Callable[..., Any]) -> str:
    """The function's name, or the class name of any other callable object."""
    function = _unwrap(function)
    return getattr(function, "__name__", type(function).__name__)


class Loop:
    """One event loop in its own thread, so that callers may run in another loop and functions may keep connections."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_serve, args=(self._loop,), name="rewards", daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._loop, thread)

    def gather(self, awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
        """What the awaitables return, or the exceptions that they raise, in their order."""
        future = asyncio.run_coroutine_threadsafe(_gather(awaitables), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def call_all(calls: Sequence[Callable[[], Any]], loop: Callable[[], Loop]) -> list[Any]:
    """What the calls return or raise, in their order; awaitables that they return are awaited together at the end."""
    results = [_attempt(call) for call in calls]
    waiting = [index for index, result in enumerate(results) if inspect.isawaitable(result)]
    if waiting:
        for index, result in zip(waiting, loop().gather([results[index] for index in waiting]), strict=True):
            results[index] = result
    return results


def read(function: Callable[..., Any], result: Any, size: int) -> tuple[Float32[np.ndarray, " N"], int, list[Fault]]:
    """The function's rewards, NaN where it gave none; how many completions it failed on; and why."""
    values = np.full(size, np.nan, np.float32)
    if isinstance(result, BaseException):
        return values, size, [(f"all {number_of(size, 'completion')}: {_describe(function, result)}", result)]
    alone = not hasattr(result, "__len__") or getattr(result, "ndim", 1) == 0  # 0-d arrays have __len__ too
    if isinstance(result, str | Mapping) or alone:
        return (
            values,
            size,
            [(f"returned {reprlib.repr(result)}, expected a list of {number_of(size, 'number')}", None)],
        )
    if len(result) != size:
        return (
            values,
            size,
            [(f"returned {number_of(len(result), 'value')}, expected {size}, one for each completion", None)],
        )
    faults: list[Fault] = []
    for index, value in enumerate(result):
        if isinstance(value, BaseException):
            faults.append((f"completion {index}: {_describe(function, value)}", value))
        elif value is not None:
            values[index] = _number(value)
            if np.isnan(values[index]):
                faults.append((f"completion {index}: {reprlib.repr(value)}, expected a finite number or None", None))
    return values, len(faults), faults


class Log:
    """What functions log besides their rewards."""

    def __init__(self, size: int) -> None:
        self._size, self.columns = size, {}
        self._values: dict[str, list[float]] = collections.defaultdict(list)

    def metric(self, name: str, value: Any) -> None:
        """Records a number; the mean of all that are recorded under a name is reported."""
        _refuse_taken("log_metric", name, NUMBERS)
        self._values[name].append(float(value))

    def extra(self, column: str, values: Any) -> None:
        """Records a list or array with one value per completion."""
        _refuse_taken("log_extra", column, COLUMNS)
        if len(values) != self._size:
            raise UserError(
                f"log_extra({column!r}): {number_of(len(values), 'value')}, expected {self._size}, one a completion"
            )
        self.columns[column] = [_plain(value) for value in values]

    def means(self) -> dict[str, float]:
        """The mean of each metric, by name."""
        return {name: float(np.mean(values)) for name, values in self._values.items()}


def _refuse_taken(function: str, name: str, taken: tuple[str, ...]) -> None:
    if name in taken:
        raise UserError(f"{function}({name!r}): found a name that is taken, expected none of {', '.join(taken)}")


def _plain(value: Any) -> Any:
    """The value in a form that JSON can hold: arrays as lists, anything that JSON does not support as text."""
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy, JAX and torch
        value = value.tolist()
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


def _number(value: Any) -> np.float32:
    """The value as a float32, or NaN if it is not a finite number in float32."""
    if isinstance(value, str | bytes):
        return np.float32(np.nan)
    try:
        with np.errstate(over="ignore"):
            number = np.float32(float(value))
    except (TypeError, ValueError, OverflowError):
        return np.float32(np.nan)
    return number if np.isfinite(number) else np.float32(np.nan)


def _attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except pyfile.ERRORS as error:  # a user's function may raise anything, SystemExit included; `read` reports it
        return error


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*map(_answer, awaitables), return_exceptions=True)


async def _answer(awaitable: Awaitable[Any]) -> Any:
    """What the awaitable returns or raises: a SystemExit that left the task would end the event loop and its thread."""
    try:
        return await awaitable
    except pyfile.ERRORS as error:
        return error


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if threading.current_thread() is not thread:
        thread.join()


def _describe(function: Callable[..., Any], error: BaseException) -> str:
    function = _unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    known = code is not None and error.__traceback__ is not None
    return pyfile.describe(code.co_filename, error) if known else f"{type(error).__name__}: {error}"


def _unwrap(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)
