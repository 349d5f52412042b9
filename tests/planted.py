"""Plants the faults of tests/planted.toml, one line each, and runs the tests that must notice: whether they can fail.

    python tests/planted.py [--list] [--only NAME ...] [--clean]

Each fault is put into a copy of the package and its module's tests are run there; the checkout is never edited.
`--clean` runs the same tests without a fault first. Not collected by pytest: it takes several minutes.
`tests/test_planted.py` checks in every run of the suite that each line is still there.
"""

import argparse
import contextlib
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import time
import tomllib
import traceback
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What the tests import and the faults are not in: one process imports it, and is forked for each fault.
PRELOADED = ("jax", "jax.numpy", "flax.linen", "flax.nnx", "optax", "orbax.checkpoint", "torch", "transformers", "peft")
LIMIT = 300


class Fault(NamedTuple):
    """One line of the package, and what a mistake would make of it.

    Attributes:
        file: below jlora/.
        before: text that the file holds exactly once.
        tests: pytest's arguments, below tests/, of the tests that must fail.
    """

    name: str
    file: str
    before: str
    after: str
    tests: str


FAULTS = tuple(
    Fault(**fault) for fault in tomllib.loads((ROOT / "tests/planted.toml").read_text(encoding="utf-8"))["fault"]
)


def planted(text: str, fault: Fault) -> str:
    """The file's text with the fault in it.

    Raises:
        ValueError: the line is not there exactly once.
    """
    if (count := text.count(fault.before)) != 1:
        raise ValueError(f"{fault.name!r}: jlora/{fault.file} holds this {count} times: {fault.before!r}")
    return text.replace(fault.before, fault.after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--list", action="store_true", help="only print the faults")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults whose name or file holds one of these")
    parser.add_argument("--clean", action="store_true", help="run the tests without a fault first: they must pass")
    arguments = parser.parse_args()
    chosen = [f for f in FAULTS if not arguments.only or any(n in f.name or n in f.file for n in arguments.only)]
    if arguments.list:
        for fault in chosen:
            say(f"jlora/{fault.file}: {fault.name}  (tests/{fault.tests})")
        return 0
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        os.environ["TMPDIR"] = folder  # what the tests keep there goes with it
        copy = pathlib.Path(folder) / "checkout"
        for name in ("jlora", "tests", "configs", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        preload()
        broken = check_clean(copy, chosen) if arguments.clean else []
        missed = [fault.name for fault in chosen if not is_noticed(copy, fault)]
    say(f"{len(chosen) - len(missed)} of {len(chosen)} faults noticed")
    return 1 if missed or broken else 0


def check_clean(copy: pathlib.Path, faults: list[Fault]) -> list[str]:
    """The tests that fail without a fault."""
    broken = []
    for tests in dict.fromkeys(fault.tests for fault in faults):
        code, seconds = run(copy, tests)
        say(f"{'passes' if code == 0 else f'ENDS {code}':<11} {seconds:5.1f} s  tests/{tests}")
        broken += [tests] if code else []
    return broken


def is_noticed(copy: pathlib.Path, fault: Fault) -> bool:
    """Whether a test fails (nothing else counts: not an import that breaks, nor that no test is found)."""
    path = copy / "jlora" / fault.file
    text = path.read_text(encoding="utf-8")
    path.write_text(planted(text, fault), encoding="utf-8")
    try:
        code, seconds = run(copy, fault.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    found = {0: "NOT NOTICED", 1: "noticed"}.get(code, f"ENDS {code}")
    say(f"{found:<11} {seconds:5.1f} s  {fault.name} (jlora/{fault.file})")
    if code not in (0, 1):
        say((copy.parent / "output.txt").read_text(encoding="utf-8", errors="replace")[-2000:])
    return code == 1


def run(copy: pathlib.Path, tests: str) -> tuple[int, float]:
    """(pytest's exit code, seconds) of these tests, in a process of their own; 124 past the limit."""
    first, *rest = shlex.split(tests)
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 3
        try:
            code = run_here(copy, [f"tests/{first}", *rest])
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stderr.flush()
            os._exit(code)
    while time.monotonic() - began < LIMIT:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 124, time.monotonic() - began


def run_here(copy: pathlib.Path, arguments: list[str]) -> int:
    import pytest

    os.chdir(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True
    with open(copy.parent / "output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        return int(
            pytest.main(
                ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported", *arguments]
            )
        )


def preload() -> None:
    """Import what is slow to import, as tests/conftest.py would, once."""
    import importlib
    import warnings

    # Read when JAX starts its devices, which no import does.
    os.environ["JAX_PLATFORMS"], os.environ["HF_HUB_OFFLINE"] = "cpu", "1"
    sys.path = [place for place in sys.path if pathlib.Path(place or ".").resolve() not in (ROOT, ROOT / "tests")]
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        for name in PRELOADED:
            importlib.import_module(name)


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 (a program's output)


if __name__ == "__main__":
    sys.exit(main())
