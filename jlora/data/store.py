"""Encoded documents and items in a few flat arrays, in memory or mapped from files: each costs only its tokens."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jlora.data.template import common_prefix

Record = dict[str, Any]

COLUMNS = {"tokens": np.int32, "trained": np.bool_}


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document: its tokens, and for each whether the loss counts predicting it."""

    tokens: Int32[np.ndarray, " T"]
    trained: Bool[np.ndarray, " T"]


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """Documents that belong in one step: (chosen, rejected), or a single one; and the numbers that go with them.

    Attributes:
        record: what the item was made of, if that is to be kept with it. The items of `Items` do not have it.
    """

    documents: tuple[Example, ...]
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    record: Record | None = None


class Examples(Sequence[Example]):
    """Documents whose tokens lie one after another.

    Attributes:
        columns: "tokens" and "trained" of all documents.
        bounds: int64 [N + 1], where each document begins, and where the last one ends.
        checksum: of all tokens, which of them are trained, and their order, as eight hex digits.
    """

    def __init__(self, columns: dict[str, np.ndarray], bounds: Int64[np.ndarray, " N"], checksum: str) -> None:
        self.columns, self.bounds, self.checksum = columns, bounds, checksum

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each document."""
        return np.diff(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return Example(*(self.columns[name][self.bounds[place] : self.bounds[place + 1]] for name in COLUMNS))


class Records(Sequence[Record]):
    """Records that lie one after another as JSON, and exist only while somebody looks at them."""

    def __init__(self, text: np.ndarray, bounds: Int64[np.ndarray, " N"]) -> None:
        self._text, self._bounds = text, bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return json.loads(self._text[self._bounds[place] : self._bounds[place + 1]].tobytes())


class Items(Sequence[Item]):
    """Items of equally many documents, which exist only while somebody looks at them.

    Attributes:
        examples: their documents, those of an item one after another.
        sides: the number of documents of each item.
        values: float64 [N] by name: the numbers that go with them.
        shared: int32 [N], `common_start` of each item's documents.
        records: the records that were kept with the items.
    """

    def __init__(
        self,
        examples: Examples,
        sides: int = 1,
        values: Mapping[str, np.ndarray] | None = None,
        shared: np.ndarray | None = None,
        records: Sequence[Record] = (),
    ) -> None:
        self.examples, self.sides, self.values, self.records = examples, sides, dict(values or {}), records
        self.shared = np.zeros(len(self), np.int32) if shared is None else shared

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each document of each item, int64 [N, S]."""
        return self.examples.lengths.reshape(-1, self.sides)

    def with_values(self, values: Mapping[str, np.ndarray]) -> "Items":
        """The items with these numbers added to theirs."""
        return Items(self.examples, self.sides, self.values | dict(values), self.shared, self.records)

    def __len__(self) -> int:
        return len(self.examples) // self.sides

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        documents = self.examples[place * self.sides : (place + 1) * self.sides]
        return Item(tuple(documents), {name: float(values[place]) for name, values in self.values.items()})


def common_start(examples: Sequence[Example]) -> int:
    """How many tokens the examples can share: the length of their common start, as far as it is not trained.

    The last token of a prompt is not shared, because what it predicts differs. A single example shares nothing.
    """
    if len(examples) < 2:
        return 0
    first, *others = examples
    alike = min(common_prefix(first.tokens, other.tokens) for other in others)
    return min(alike, *(_untrained(example) for example in examples))


def _untrained(example: Example) -> int:
    """How many tokens precede the one that predicts the first trained token; all but the last if none is trained."""
    trained = np.flatnonzero(example.trained[1:])
    return int(trained[0]) if len(trained) else len(example.tokens) - 1
