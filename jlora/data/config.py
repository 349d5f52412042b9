"""Data settings: which files, and how their records become rows of tokens."""

import dataclasses
from typing import Literal

from jlora.data.records import OnError
from jlora.errors import UserError

OVERLONG = ("cut", "drop", "error")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data settings.

    Attributes:
        path: file to train on: JSONL or a JSON array (gzipped or not), .parquet, .arrow, or a folder of `datasets`.
        eval_path: file to evaluate on, or None.
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

    path: str
    eval_path: str | None = None
    packing: bool = True
    overlong: str = "drop"
    completion_only: bool = True
    share_prompts: bool = True
    bucket: int = 64
    on_error: OnError = "raise"
    system: Literal["template", "fold"] = "template"
    cache: str | None = "~/.cache/jlora/tokens"

    def __post_init__(self) -> None:
        faults = []
        if not self.path:
            faults.append(f"data.path: found {self.path!r}, expected the path of a file")
        if self.eval_path == "":
            faults.append("data.eval_path: found '', expected the path of a file, or None")
        if self.overlong not in OVERLONG:
            faults.append(f"data.overlong: found {self.overlong!r}, expected one of {', '.join(OVERLONG)}")
        if self.bucket < 1:
            faults.append(f"data.bucket: found {self.bucket}, expected a whole number of at least 1")
        if faults:
            raise UserError("the data settings are invalid:\n  " + "\n  ".join(faults))
