"""Data settings: which files, and how their records become rows of tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jlora.data.records import OnError
from jlora.data.sources import Form, Source, Sources
from jlora.errors import raise_all

Path = str | tuple[str, ...]

OVERLONG = ("cut", "drop", "error")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which records are trained on and evaluated on, and how they become rows of tokens.

    Attributes:
        path: what to train on: a file (JSONL or a JSON array, .csv, .tsv, .parquet, .arrow, .txt; text may be packed
            with gzip, zstd, bzip2 or xz), a folder or a pattern of such files, a folder of `datasets`, or
            "OWNER/NAME/SUBSET:SPLIT" of the Hub; or several of them, as a list or with commas.
        sources: a mixture, in place of `path`: sources by name, each with a `path` and, where it differs, `form`,
            `columns`, `weight`, `limit` and `completion_only` (`jlora.data.sources.Source`). With weights, an epoch has
            as many records as the sources hold together, and each source provides its share of them: small ones are
            repeated, of large ones a part is read in each epoch, and the rest in later ones.
        eval_path: what to evaluate on, or None.
        eval_share: evaluate on this share of the records, which are then not trained on; a hash of a record's question
            decides.
        form: "auto" takes each row as what it is; "messages", "prompt", "instruction" and "text" read this form alone.
        columns: {key that jlora reads: column of the file}, as in {"prompt": "problem", "completion": "solution"}.
        limit: train only on the first so many records of `path`.
        window_overlap: a text without a prompt that is longer than `train.seq_len` becomes windows, each of which
            begins with so many tokens of the one before it, as context; 1: each token is trained once. None: `overlong`
            decides.
        packing: several documents share a row of `train.seq_len` tokens; attention and loss stay inside a document.
        overlong: what happens to a document longer than `train.seq_len`: "cut" keeps its start, "drop" leaves out its
            record, "error" raises.
        completion_only: the loss counts only assistant turns and completions, not the prompt.
        share_prompts: answers to one prompt (the sides of a pair, the completions of a group) follow one copy of it,
            which is read once; the results are the same.
        bucket: row lengths are rounded up to a multiple of this, so that few shapes are compiled.
        on_error: "raise" ends the run if records cannot be read or encoded, "skip" leaves them out and reports them.
        system: "template" leaves a system text to the chat template; "fold" puts it at the start of the first user's
            turn, for templates that do not write one. Exported merged models fold too.
        cache: folder where encoded records are kept, so that the next run with the same data, tokenizer and settings
            begins at once (files below 1 MiB are not); None: they are encoded each time. What is in it may be removed
            whenever no run uses it.

    Raises:
        ValueError: settings are out of range; all are listed.
    """

    path: Path | None = None
    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    eval_path: Path | None = None
    eval_share: float = 0.0
    form: Form = "auto"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    window_overlap: int | None = 1
    packing: bool = True
    overlong: str = "drop"
    completion_only: bool = True
    share_prompts: bool = True
    bucket: int = 64
    on_error: OnError = "raise"
    system: Literal["template", "fold"] = "template"
    cache: str | None = "~/.cache/jlora/tokens"

    def __post_init__(self) -> None:
        faults = self._source_faults()
        if self.overlong not in OVERLONG:
            faults.append(f"data.overlong: found {self.overlong!r}, expected one of {', '.join(OVERLONG)}")
        if self.bucket < 1:
            faults.append(f"data.bucket: found {self.bucket}, expected a whole number of at least 1")
        if self.window_overlap is not None and self.window_overlap < 0:
            faults.append(f"data.window_overlap: found {self.window_overlap}, expected 0 or more, or None")
        raise_all(faults)

    def _source_faults(self) -> list[str]:
        faults = []
        if self.path is None and not self.sources:
            faults.append("data.path: is required (or data.sources)")
        elif self.path is not None and self.sources:
            faults.append("data.path: found it beside data.sources, expected one of them")
        elif not self.path and not self.sources:
            faults.append(f"data.path: found {self.path!r}, expected the path of a file")
        if self.eval_path is not None and not self.eval_path:
            faults.append(f"data.eval_path: found {self.eval_path!r}, expected the path of a file, or None")
        if self.eval_path and self.eval_share:
            faults.append("data.eval_share: found it beside data.eval_path, expected one of them")
        if not 0 <= self.eval_share < 1:
            faults.append(f"data.eval_share: found {self.eval_share}, expected a number from 0 to below 1")
        if self.limit is not None and self.limit < 1:
            faults.append(f"data.limit: found {self.limit}, expected a whole number of at least 1")
        if self.sources and (self.limit or self.columns or self.form != "auto"):
            faults.append("data.form, data.columns, data.limit: with data.sources, each source has its own")
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            missing = ", ".join(name for name in self.sources if name not in weighted)
            faults.append(f"data.sources: found no weight for {missing}, expected one for every source, or for none")
        return faults

    @property
    def train(self) -> Sources:
        """What is trained on."""
        return Sources(self.sources or {"": self._alone(self.path, self.limit)}, self.eval_share)

    @property
    def evaluation(self) -> Sources | None:
        """What is evaluated on, if anything is."""
        if self.eval_share:
            return dataclasses.replace(self.train, held_out=True)
        return Sources({"": self._alone(self.eval_path, None)}) if self.eval_path else None

    def completion_only_of(self, sources: Sources) -> list[bool]:
        """`completion_only` of each source."""
        own = [source.completion_only for source in sources.sources.values()]
        return [self.completion_only if one is None else one for one in own]

    def _alone(self, path: Path, limit: int | None) -> Source:
        return Source(path, form=self.form, columns=self.columns, limit=limit)
