"""Python files that users write: recipes, metrics, rewards; loaded by path, their errors told with file and line."""

import importlib.util
import inspect
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from jlora.errors import MissingFileError, UserError

# What a user's file can raise while it is run: anything, sys.exit() too. Memory may run out for other reasons.
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
    # Named after its path, so that two files of one name do not meet; registered, as dataclasses in the file need it.
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
    """What the file's function returns; a UserError that names the line where it failed, whatever it raises."""
    try:
        return function(*arguments)
    except MemoryError:
        raise
    except ERRORS as error:
        raise UserError(describe(path, error)) from error


def require_arguments(path: str, function: Callable[..., Any], *names: str) -> None:
    """Raises UserError when the file's function cannot be called with as many arguments as there are names."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions of C have none to show
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise UserError(f"{path} defines {name}{signature}: {error}; expected {name}({', '.join(names)})") from error


def describe(path: str, error: BaseException) -> str:
    """'FILE, line 3: KeyError: ...' with the last line of the file that the error went through, if there is one."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(pathlib.Path(path))
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    where = f"{path}, line {line}" if line else path
    return f"{where}: {type(error).__name__}: {error}"
