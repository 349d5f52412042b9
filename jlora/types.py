"""Shared vocabulary: the letters of dimensions, the type of a param tree, optional packages.

Letters used in shape annotations everywhere:
    B batch   T tokens (queries)   S tokens (keys)   D model width   N output width of a linear   V vocabulary
    H query heads   K key/value heads   G query heads a key/value head   F width of a head   R LoRA rank   L stacked
    layers
"""

import importlib
import types
from typing import Any

from jlora.errors import MissingPackageError

Params = dict[str, Any]

# Segment s + b · BRANCH is a branch of segment s: its tokens see those of s and their own, not those of other branches.
BRANCH = 1 << 16
# The checkpoint_name of values that are dear to compute again: outputs of products and of attention.
SAVED = "saved"


def require(module: str, extra: str) -> types.ModuleType:
    """The optional package `module`, imported; an ImportError that names jlora's extra when it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        message = f"this needs the package {module!r}, which is not installed: pip install 'jlora[{extra}]'"
        raise MissingPackageError(message, name=module) from error
