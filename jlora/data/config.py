"""Settings of the data: which files, and how their records become rows of tokens."""

import dataclasses
from typing import Literal

from jlora.data.records import OnError
from jlora.errors import UserError

OVERLONG = ("cut", "drop", "error")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Settings of the data.

    Args:
      path: file to train on: JSONL or a JSON array (gzipped or not), .parquet, .arrow, or a folder of datasets.
      eval_path: file to evaluate on, or None.
      on_error: "raise" ends the run when records cannot be read or encoded, "skip" leaves them out and says so.
      packing: several documents share a row of `train.seq_len`; attention and loss stay inside a document.
      overlong: what happens to a document longer than `train.seq_len`: "cut" keeps its start, "drop", or "error".
      completion_only: the loss counts assistant turns and completions only, not the prompt.
      share_prompts: answers to one prompt (the sides of a pair, the completions of a group) stand behind one copy of
        it, which is read once; what comes out is the same.
      system: "template" leaves it to the chat template to write a system text, "fold" puts it at the beginning of the
        first user's turn, for templates that write none; merged folders that are exported fold likewise.
      bucket: row lengths are rounded up to a multiple of this, so that few shapes are compiled.
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
            raise UserError("the data settings do not hold:\n  " + "\n  ".join(faults))
