"""Parameter-efficient fine-tuning of language models in JAX: LoRA as a transformation of the param tree.

What is named here is imported when it is first used (PEP 562), so that `jlora --help` need not wait for JAX.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora import lora, quant, sharding, tree
    from jlora.errors import UserError
    from jlora.generate import generate
    from jlora.hub import convert_adapter, load, load_adapter, load_tokenizer, save_adapter, save_model
    from jlora.lora import LoraConfig
    from jlora.quant import QuantConfig
    from jlora.sharding import MeshConfig, make_mesh

__all__ = [
    "LoraConfig",
    "MeshConfig",
    "QuantConfig",
    "UserError",
    "convert_adapter",
    "generate",
    "load",
    "load_adapter",
    "load_tokenizer",
    "lora",
    "make_mesh",
    "quant",
    "save_adapter",
    "save_model",
    "sharding",
    "tree",
]

# Where each name is defined; names that are not here are parts of the package.
_HOMES = {
    "LoraConfig": "jlora.lora",
    "MeshConfig": "jlora.sharding",
    "QuantConfig": "jlora.quant",
    "UserError": "jlora.errors",
    "convert_adapter": "jlora.hub",
    "generate": "jlora.generate",
    "load": "jlora.hub",
    "load_adapter": "jlora.hub",
    "load_tokenizer": "jlora.hub",
    "make_mesh": "jlora.sharding",
    "save_adapter": "jlora.hub",
    "save_model": "jlora.hub",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    part = f"{__name__}.{name}"
    try:
        if not name.startswith("_"):
            return importlib.import_module(part)
    except ModuleNotFoundError as error:
        if error.name != part:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """The package, in which `generate` is the function, although a part of the package has the same name.

    Python's import sets a package's attribute to each part that it has imported; this one stays as it is.
    """

    @property
    def generate(self) -> Any:
        return __getattr__("generate")

    @generate.setter
    def generate(self, part: types.ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
