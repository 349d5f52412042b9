"""Shared vocabulary: dimension letters, the type of a param tree, optional packages.

Letters used in shape annotations everywhere:
    B batch   T tokens (queries)   S tokens (keys)   D model width   N output width of a linear   V vocabulary
    H query heads   K key/value heads   G query heads per key/value head   F width of a head   R LoRA rank   L stacked
    layers
"""

import importlib
import types
from typing import Any

from jlora.errors import MissingPackageError

Params = dict[str, Any]

# Segment s + b · BRANCH is a branch of segment s: its tokens see those of s and their own, not other branches'.
BRANCH = 1 << 16
# The checkpoint_name of values that are expensive to recompute: outputs of matrix products and of attention.
SAVED = "saved"


def require(module: str, extra: str) -> types.ModuleType:
    """Imports and returns the optional package `module`.

    Raises:
        ImportError: it is not installed; the message names jlora's extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        message = f"this needs the package {module!r}, which is not installed: pip install 'jlora[{extra}]'"
        raise MissingPackageError(message, name=module) from error
