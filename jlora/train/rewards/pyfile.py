"""Python files written by users (recipes, metrics, rewards): loaded by path, with errors that name file and line."""

import importlib.util
import inspect
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from jlora.errors import MissingFileError, UserError

# What a user's file may raise when run: anything, SystemExit included. `call` lets MemoryError through, since memory
# may run out for other reasons.
ERRORS = (Exception, SystemExit)


def load_function(path: str, name: str) -> Callable[..., Any]:
    """The function `name` of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be run, or has no such function.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise MissingFileError(f"{path} is not a file; expected a Python file that defines {name}()")
    # Named after its path, so that files of the same name do not collide; registered, as dataclasses in it need that.
    module_name = f"jlora_user_{abs(hash(file.resolve())):x}"
    spec = importlib.util.spec_from_loader(module_name, importlib.machinery.SourceFileLoader(module_name, str(file)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    call(path, spec.loader.exec_module, module)
    function = getattr(module, name, None)
    if not callable(function):
        own = sorted(key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name)
        raise UserError(f"{path} defines no function {name}(); it defines {', '.join(own) or 'none at all'}")
    return function


def call(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the file's function returns.

    Raises:
        UserError: it raised anything but MemoryError; the message names the line where it failed.
    """
    try:
        return function(*arguments)
    except MemoryError:
        raise
    except ERRORS as error:
        raise UserError(describe(path, error)) from error


def require_arguments(path: str, function: Callable[..., Any], *names: str) -> None:
    """Raises UserError if the file's function cannot be called with as many positional arguments as there are names."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some C functions have no signature to show
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise UserError(f"{path} defines {name}{signature}: {error}; expected {name}({', '.join(names)})") from error


def describe(path: str, error: BaseException) -> str:
    """'FILE, line 3: KeyError: ...', with the last line of the file that the error passed through, if any."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(pathlib.Path(path))
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    where = f"{path}, line {line}" if line else path
    return f"{where}: {type(error).__name__}: {error}"
