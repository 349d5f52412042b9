"""The compiled programs of a running batch: a few for each size of the cache, each compiled once, ahead of time."""

import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jlora import tree
from jlora.generate.sampling import Settings
from jlora.models import Model
from jlora.serve import rows as device
from jlora.serve.rows import Rows, Turn
from jlora.types import Params


class Programs:
    """Every program that a batch of `count` rows may run.

    A program depends on the size of the cache and on the shape of the piece of prompts that it reads, and on nothing
    that a request or an adapter brings along.

    Args:
        params: those that programs will be called with, or others of the same shapes and on the same devices.
        banked: whether they are a bank's.
        sizes: the sizes that the cache may have, rising.
        shapes: the shapes (rows, tokens) of pieces of prompts.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        count: int,
        *,
        banked: bool,
        sizes: Sequence[int],
        shapes: Sequence[tuple[int, int]],
    ) -> None:
        self.model, self.count, self.banked = model, count, banked
        self.sizes, self.shapes = tuple(sizes), tuple(shapes)
        self._params = tree.abstract(params, jax.tree.map(lambda leaf: leaf.sharding, params))
        self._made: dict[tuple, concurrent.futures.Future] = {}
        self._lock, self._closed = threading.Lock(), False

    def __len__(self) -> int:
        return len(self._made)

    def empty(self, size: int) -> Callable[[Params], Rows]:
        return self._get(("empty", size))

    def step(self, size: int) -> Callable[[Params, Rows, Turn], tuple[Rows, device.Drawn]]:
        return self._get(("step", size))

    def read(self, size: int, shape: tuple[int, int]) -> Callable[..., Rows]:
        return self._get(("read", size, shape))

    def copy(self, size: int) -> Callable[..., Rows]:
        return self._get(("copy", size))

    def begin(self, size: int) -> Callable[..., Rows]:
        return self._get(("begin", size))

    def resize(self, size: int, other: int) -> Callable[[Params, Rows], Rows]:
        return self._get(("resize", size, other))

    def rows(self, size: int) -> Rows:
        """The shapes of the rows with a cache of this size, and where they are."""
        shapes = jax.eval_shape(lambda params: device.empty(self.model, params, self.count, size), self._params)
        return tree.abstract(shapes, self.empty(size).output_shardings)

    def warm(self, sizes: Sequence[int] | None = None, before: Callable[[], Any] = lambda: None) -> None:
        """Compiles what caches of these sizes need (default: all); stops early after `close`.

        Args:
            before: called before each program.
        """
        for size in self.sizes if sizes is None else sizes:
            whole = [(name, size) for name in ("step", "empty", "copy", "begin")]
            for key in [*whole, *(("read", size, shape) for shape in self.shapes)]:
                before()
                if not self._closed:
                    self._get(key)

    def close(self) -> None:
        """Ends `warm` in another thread after the program that it is at."""
        self._closed = True

    def _get(self, key: tuple) -> Callable[..., Any]:
        with self._lock:
            found = self._made.get(key)
            mine = found is None
            if mine:
                found = self._made[key] = concurrent.futures.Future()
        if mine:
            try:
                found.set_result(self._compiled(*key))
            except BaseException as error:
                found.set_exception(error)
                raise
        return found.result()

    def _compiled(self, name: str, size: int, *more: Any) -> Callable[..., Any]:
        if name == "empty":
            return device.empty.lower(self.model, self._params, self.count, size).compile()
        rows, number = self.rows(size), np.int32(0)
        if name == "step":
            return device.step.lower(self.model, self._params, rows, idle(self.count, banked=self.banked)).compile()
        if name == "read":
            return device.read.lower(self.model, self._params, rows, *nothing(*more[0], banked=self.banked)).compile()
        if name == "copy":
            return device.copy.lower(rows, number, number).compile()
        if name == "begin":
            return device.begin.lower(rows, number, np.zeros(self.model.config.vocab_size, bool)).compile()
        return device.resize.lower(self.model, self._params, rows, *more).compile()


def idle(count: int, *, banked: bool) -> Turn:
    """A turn in which no row is active, to be filled in."""

    def zeros(dtype: Any, *more: int) -> np.ndarray:
        return np.zeros((count, *more), dtype)

    neutral = {"top_k": zeros(np.int32), "top_p": np.ones(count, np.float32)}
    neutral["repetition_penalty"] = np.ones(count, np.float32)
    return Turn(
        active=zeros(bool),
        lengths=zeros(np.int32),
        given=zeros(np.int32),
        adapters=zeros(np.int32) if banked else None,
        seeds=zeros(np.uint32, 2),
        choices=zeros(np.int32),
        numbers=zeros(np.int32),
        settings=Settings(**{name: neutral.get(name, zeros(np.float32)) for name in Settings._fields}),
        told=np.array(False),
    )


def nothing(rows: int, tokens: int, *, banked: bool) -> tuple[np.ndarray | None, ...]:
    """The arguments (which, tokens, starts, counts, adapters) that read nothing, to be filled in."""
    zeros = [np.zeros(rows, np.int32) for _ in range(4)]
    return zeros[0], np.zeros((rows, tokens), np.int32), *zeros[1:3], zeros[3] if banked else None
