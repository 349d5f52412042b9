"""Adapter folders in every format that jlora loads without converting them."""

import warnings
from pathlib import Path
from typing import Any

from jlora.hub import mlx
from jlora.hub.checkpoints.source import locate_adapter
from jlora.hub.checkpoints.weights import read_json
from jlora.hub.peft import reading as peft
from jlora.hub.peft.config import CONFIG
from jlora.types import Params


def load_adapter(
    params: Params, path: str | Path, base: str | Path | None = None, *, peft_version: str | None = None
) -> Params:
    """The params with the adapter of a PEFT or mlx-lm folder (or Hub id) in place of any adapter they had.

    Layers that the adapter leaves out get rank 0: zero leaves, and a `lora_rank` leaf beside them.

    Args:
        base: where the params come from; a warning is given if the adapter's config names another model.
        peft_version: the version of PEFT that wrote the folder, if its config says another or none. The order of A and
            B in adapters of experts depends on it (`jlora.hub.peft.experts`).

    Raises:
        FileNotFoundError: the folder or its files are missing.
        ValueError: the adapter uses features that jlora does not have, or tensors are missing, unknown or misshapen;
            all are listed.
    """
    folder = locate_adapter(path)
    fields = read_json(folder / CONFIG)
    if base is not None:
        _say_other_base(fields.get("base_model_name_or_path") or fields.get("model"), folder, str(base))
    if mlx.is_mlx(fields):
        return mlx.load_adapter(params, folder)
    return peft.load_adapter(params, folder, peft_version=peft_version)


def check_adapter(path: str | Path) -> None:
    """Raises UserError if the adapter cannot be opened on any model; its weights are not read."""
    folder = locate_adapter(path)
    if not mlx.is_mlx(read_json(folder / CONFIG)):
        peft.open_adapter(folder)


def _say_other_base(named: Any, folder: Path, base: str) -> None:
    """Warns if the base's path does not contain the last part of the name in the adapter's config.

    The same model may be in a folder of its name, or in a cache (models--owner--name/…).
    """
    last = str(named or "").rstrip("/").rpartition("/")[2].lower()
    if last and last not in f"{base} {Path(base).expanduser().resolve()}".lower():
        warnings.warn(f"{folder}: {CONFIG} names the base model {named}; it is applied to {base}", stacklevel=3)
