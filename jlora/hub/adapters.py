"""Adapter folders of every kind that jlora opens as they are."""

from pathlib import Path

from jlora.hub import mlx, peft
from jlora.hub.adapter_config import CONFIG
from jlora.hub.source import locate_adapter
from jlora.hub.weights import read_json
from jlora.types import Params


def load_adapter(params: Params, path: str | Path) -> Params:
    """The params with the adapter of a PEFT or mlx-lm folder (or Hub id) in place of whatever adapter they had.

    Layers that the adapter leaves out get rank 0: zero leaves, and a `lora_rank` leaf beside them.

    Raises:
        FileNotFoundError: the folder or its files are missing.
        ValueError: features that jlora does not have; missing, unknown and misshapen tensors. All are listed.
    """
    folder = locate_adapter(path)
    if mlx.is_mlx(read_json(folder / CONFIG)):
        return mlx.load_adapter(params, folder)
    return peft.load_adapter(params, folder)
