"""The `jlora` command: runs the subcommand, and turns errors into a message and an exit code."""

import contextlib
import errno
import functools
import importlib
import logging
import os
import pathlib
import platform
import sys
import threading
import traceback
import warnings
import zlib
from collections.abc import Iterator, Sequence

from jlora.cli import parsers
from jlora.cli.parsers import COMMANDS
from jlora.errors import Failed, UserError, is_of_the_system

# Errors of the operating system that are not bugs: a full disk, an exhausted quota, a file too big for its disk.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# And those of a place that was named: no permission, a read-only disk, a name that is too long.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)

# How errors of a device without enough memory begin, and what then can be done.
EXHAUSTED = "RESOURCE_EXHAUSTED"
FEWER = "--quant, fewer rows and shorter texts need less"
ROOM = {"train": "`jlora plan` with the same settings says what a step needs, and what would fit"}

DONE, FAILED, MISTAKE = 0, 1, 2

# Variables that XLA's compilers read on import. Without them libtpu queries the TPU machine that it is not on, refuses
# to compile while another process has it loaded, and all compilers warn of programs that do not fit.
COMPILERS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
ENVIRONMENT = {"plan": COMPILERS}
# Commands whose compiled programs are kept for the next start. `plan` is none: it tells how long compiling takes.
COMPILING = ("train", "eval", "generate", "chat", "serve")
SAVING = ("train",)  # commands that write checkpoints in the background
MOST_BYTES = 4 * 2**30  # of compiled programs; those that were used least lately go

USAGE = """usage: jlora COMMAND [OPTIONS]

LoRA and QLoRA fine-tuning of language models in JAX.

{commands}

`jlora COMMAND --help` explains a command.

options:
  --traceback   before COMMAND: show where in the code a mistake was noticed
  --version     show the version
  -h, --help    show this

exit codes: 0 done, 1 failed, 2 a mistake in what was asked for, 75 stopped early with everything saved
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jlora` with these arguments (default: the process's own) and returns its exit code."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        from jlora.cli import completion

        completion.complete()
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = arguments[:1] == ["--traceback"]
    arguments = arguments[1:] if show_traceback else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(), end="")
        return DONE if arguments else MISTAKE
    if arguments[0] == "--version":
        import importlib.metadata

        print(f"jlora {importlib.metadata.version('jlora')}")
        return DONE
    if arguments[0] not in COMMANDS:
        return _complain(f"{arguments[0]!r} is not a command; the commands are {', '.join(COMMANDS)}")
    if arguments[0] in SAVING:
        _quiet_writers()
    with _plain_warnings():
        return _run(arguments[0], arguments[1:], show_traceback)


def _run(command: str, arguments: list[str], show_traceback: bool) -> int:
    try:
        options = parsers.parse(command, arguments)
        _prepare(command)
        module = importlib.import_module(f"jlora.cli.{command}")
        if "absl.logging" in sys.modules:
            # Orbax logs a traceback for each error before raising it, and what follows from reading only.
            logging.getLogger("absl").setLevel(logging.CRITICAL)
        code = module.run(options)
        if sys.stdout:  # there is none if it was closed
            sys.stdout.flush()  # here, where it can be said if nobody reads it
        return code
    except SystemExit as finished:  # argparse: 0 after --help, 2 after its own message
        return finished.code if isinstance(finished.code, int) else FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain of it at its end
        return _complain("whoever read the output is gone", FAILED)
    except Exception as error:
        told = _told(error, command)
        if told is None:
            raise
        if show_traceback:
            traceback.print_exc()
        if command in SAVING and isinstance(error, Failed):
            # What is left of the writes is thrown away, with warnings of coroutines and tasks that never ended.
            warnings.simplefilter("ignore")
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        return _complain(*told)


def _told(error: Exception, command: str) -> tuple[str, int] | None:
    """The message for an error that is not a bug, and its exit code; None if the error may be one."""
    if isinstance(error, UserError | Failed):
        return str(error), MISTAKE if isinstance(error, UserError) else FAILED
    if isinstance(error, MemoryError) or str(error).startswith(EXHAUSTED):
        said = (
            str(error).strip().splitlines()[0].removeprefix(EXHAUSTED).lstrip(": ") if str(error) else "of this machine"
        )
        return f"out of memory ({said}); {ROOM.get(command, FEWER)}", FAILED
    if not isinstance(error, OSError):
        return None
    if error.errno in REFUSED and error.filename is not None:
        return f"{error.filename}: {error.strerror}", MISTAKE
    if error.errno in FULL:
        return f"{error.filename or 'a file'} could not be written: {error.strerror}", FAILED
    return None


def _prepare(command: str) -> None:
    """Sets up the libraries that the command's module imports."""
    # jlora uses only transformers' tokenizers, so its advice to install PyTorch does not apply.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name, value in ENVIRONMENT.get(command, {}).items():
        os.environ.setdefault(name, value)
    if command in COMPILING:
        _keep_compiled()


def _keep_compiled() -> None:
    """Has JAX keep compiled programs on disk, unless something says otherwise already."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        folder = pathlib.Path("~/.cache/jlora/compiled").expanduser() / _processor()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def _processor() -> str:
    """What instructions this processor has, as eight hex digits: another one may not run the same programs."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    told = next((line for line in lines if line.lower().startswith(("flags", "features"))), lines[0] if lines else "")
    return f"{zlib.crc32(f'{platform.machine()} {told}'.encode()):08x}"


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints every warning, from any library, as `warning: TEXT`, once and without its place in the code.

    Only their format changes: filters (`python -W`) work as usual. A filter could not ensure that each is printed once,
    because libraries that change filters temporarily make Python forget which warnings it has shown.
    """
    said: set[str] = set()

    def line(message: Warning | str, *_: object) -> str:
        text = f"warning: {str(message).strip()}\n"
        if text in said:
            return ""
        said.add(text)
        return text

    before, warnings.formatwarning = warnings.formatwarning, line
    try:
        yield
    finally:
        warnings.formatwarning = before


@functools.cache
def _quiet_writers() -> None:
    """Drops what the other writes of a checkpoint print once one has failed, which jlora says itself in one line.

    Orbax waits for the first failure only. Whatever it no longer waits for prints a traceback of its own, in the middle
    of that line or after it: TensorStore's threads, which find the event loop closed; that loop's tasks; other threads.
    So this lasts as long as the process.
    """

    def follows(error: BaseException | None) -> bool:
        if isinstance(error, OSError):
            return error.errno in FULL
        return str(error) == "Event loop is closed" or is_of_the_system(error)

    unraisable, thread = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = lambda args: None if follows(args.exc_value) else unraisable(args)
    threading.excepthook = lambda args: None if follows(args.exc_value) else thread(args)
    logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and follows(record.exc_info[1])))


def _complain(message: str, code: int = MISTAKE) -> int:
    print(f"jlora: {message}", file=sys.stderr)
    return code


def _usage() -> str:
    return USAGE.format(commands="\n".join(f"  {name:<12}{what}" for name, what in COMMANDS.items()))


if __name__ == "__main__":
    sys.exit(main())
