"""Freed memory is used again without page faults, in processes that ask for it."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from jlora.allocator import keep_freed_pages

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

before = faults()
told = keep_freed_pages()
faults()
print(told, before, faults())
"""
NEUTRAL = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}


def run(environment):
    command = [sys.executable, "-c", SCRIPT]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    told, before, after = output.split()
    return told == "True", int(before), int(after)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these options")
def test_freed_pages_are_kept():
    told, before, after = run(NEUTRAL)
    assert told
    assert before > 100
    assert after < 10


def test_the_users_own_configuration_wins():
    told, _, _ = run(NEUTRAL | {"MALLOC_ARENA_MAX": "4"})
    assert not told
