"""Where records come from: one source or a mixture of several, how each is read, and what is held out of them."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from jlora.data.files import Row, rows_of
from jlora.data.found import shown_row
from jlora.data.paths import Part, Reading, Where, locate
from jlora.data.tables import Cells, typed_cells
from jlora.errors import UserError, first_few, raise_all

Form = Literal["auto", "messages", "prompt", "instruction", "text"]
FORMS: tuple[str, ...] = get_args(Form)

# The keys that hold a record in each form; to force a form is to hide those of the others.
FORM_KEYS = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "completion"),
    "instruction": (
        *("instruction", "question", "query", "input", "context", "history"),
        *("output", "response", "answer"),
    ),
    "text": ("text",),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Data that are read in one way.

    Attributes:
        path: what `jlora.data.paths.locate` finds: a file, a folder, a pattern, a data set of the Hub; or several.
        form: "auto" takes the form that each row has: "messages" (or "conversations"), "prompt" (and "completion"),
            "instruction" (or a question, and its answer), "text". Any other value reads this form alone, whatever else
            a row has.
        columns: {a key that jlora reads: the column of the file that holds it}, as in {"prompt": "problem"}.
        weight: the source's share of a mixture's records, relative to the other sources' weights; None in all of them:
            every record comes once an epoch.
        limit: only the first so many records.
        completion_only: `data.completion_only` for this source; None: as for all.

    Raises:
        UserError: settings are out of range; all are listed.
    """

    path: str | tuple[str, ...]
    form: Form = "auto"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    weight: float | None = None
    limit: int | None = None
    completion_only: bool | None = None

    def __post_init__(self) -> None:
        faults = []
        if not self.path:
            faults.append(f"path: found {self.path!r}, expected the path of a file")
        if self.form not in FORMS:
            faults.append(f"form: found {self.form!r}, expected one of {', '.join(FORMS)}")
        if self.weight is not None and not (self.weight > 0 and math.isfinite(self.weight)):
            faults.append(f"weight: found {self.weight}, expected a number above 0 (leave the source out otherwise)")
        if self.limit is not None and self.limit < 1:
            faults.append(f"limit: found {self.limit}, expected a whole number of at least 1")
        raise_all(faults)

    def __str__(self) -> str:
        return first_few(_paths(self.path))

    def rows(self, reading: Reading | None = None) -> Iterator[Row]:
        """(place, row) for every row, with its columns under the names that jlora reads, in the form that is forced.

        Raises:
            UserError: see `jlora.data.files.rows`; or no row has a column that `columns` names.
        """
        missing, first = set(self.columns.values()), None
        for part in locate(self.path):
            for place, row in rows_of(part, reading):
                if missing and isinstance(row, dict):
                    missing -= row.keys()
                    first = row if first is None else first
                yield place, self._shaped(row)
        if missing and first is not None:
            names = ", ".join(map(repr, sorted(missing)))
            raise UserError(
                f"{self}: no row has the columns {names} that data.columns names; the first row is {shown_row(first)}"
            )

    def _shaped(self, row: Any) -> Any:
        if not isinstance(row, dict):
            return row
        cells = isinstance(row, Cells)
        if self.columns:
            taken = {key: row[column] for key, column in self.columns.items() if column in row}
            row = {key: value for key, value in row.items() if key not in self.columns.values()} | taken
        if self.form != "auto":
            hidden = {key for form, keys in FORM_KEYS.items() if form != self.form for key in keys}
            row = {key: value for key, value in row.items() if key not in hidden}
        try:
            return typed_cells(row) if cells else row
        except UserError as error:
            return error


@dataclasses.dataclass(frozen=True)
class Sources:
    """Sources that are read one after another, without what is held out of them, or only that.

    Attributes:
        sources: by name.
        share: of the records that are held out. A hash of a record's question decides, so that a record stays on its
            side when others come or go, and all answers to a question are on one side.
        held_out: whether these are the records that are held out.
        reading: how much of them has been read by now.
    """

    sources: Mapping[str, Source]
    share: float = 0.0
    held_out: bool = False
    reading: Reading = dataclasses.field(default_factory=Reading, compare=False, repr=False)

    @property
    def weights(self) -> tuple[float, ...]:
        """The sources' weights; () if every record comes once an epoch."""
        return tuple(source.weight for source in self.sources.values() if source.weight is not None)

    def __str__(self) -> str:
        return first_few(dict.fromkeys(one for source in self.sources.values() for one in _paths(source.path)))

    def parts(self) -> list[Part]:
        """What all sources' paths name, each once."""
        found = [part for source in self.sources.values() for part in locate(source.path)]
        return list({part.name: part for part in found}.values())

    def digests(self) -> dict[str, str]:
        """The digest of each part's files by its name, as a run's checkpoints hold them."""
        return {part.name: part.digest() for part in self.parts()}

    def settings(self) -> Any:
        """How they are read, as JSON: with the files, all that decides which records there are."""
        sources = {name: dataclasses.asdict(source) | {"weight": None} for name, source in self.sources.items()}
        return json.loads(json.dumps([sources, self.share, self.held_out and self.share > 0]))

    def takes(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is on this side."""
        return not self.share or (place_of_question(record) < self.share) == self.held_out


def as_sources(where: "Where | Sources") -> Sources:
    """The sources of a path, read as a single one."""
    if isinstance(where, Sources):
        return where
    paths = _paths(where)
    return Sources({"": Source(paths if len(paths) != 1 else paths[0])})


def place_of_question(record: Mapping[str, Any]) -> float:
    """A number from 0 to 1 that depends on the words before a record's first answer alone."""
    asked = record["messages"] if isinstance(record.get("messages"), list) else record.get("prompt")
    asked = asked or record.get("completion") or record.get("chosen")
    if isinstance(asked, list):
        first = next((place for place, one in enumerate(asked) if one["role"] == "assistant"), len(asked))
        asked = [[message["role"], message.get("content")] for message in asked[:first] or asked]
    else:
        asked = [["user", asked]]
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()) / 2**64


def _paths(where: Where) -> tuple[str, ...]:
    if isinstance(where, Sequence) and not isinstance(where, str):
        return tuple(map(str, where))
    return (str(where),)
