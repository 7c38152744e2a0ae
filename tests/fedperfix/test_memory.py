"""What a process keeps of the memory that it frees."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a rule of glibc")

# Page faults while three tensors of 10 MiB come and go together 30 times.
FAULTS = """
import resource, sys, torch
from fedperfix.run.memory import keep_freed_memory

def use():
    return [torch.ones(size << 18) for size in (10, 10, 10)]

if sys.argv[1] == "keep":
    keep_freed_memory()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES_OF_ONE_TIME = (10 + 10 + 10) << 20 >> 12


def faults(choice: str, **variables: str) -> int:
    command = [sys.executable, "-c", FAULTS, choice]
    run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    return int(run.stdout)


def test_freed_memory_is_used_again() -> None:
    if faults("as it is") < 5 * PAGES_OF_ONE_TIME:
        pytest.skip("this system lends large pages, or keeps freed memory by itself")
    assert faults("keep") < 3 * PAGES_OF_ONE_TIME


def test_what_the_user_has_set_stays() -> None:
    given = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    if faults("as it is", **given) < 5 * PAGES_OF_ONE_TIME:
        pytest.skip("this system lends large pages")
    assert faults("keep", **given) > 5 * PAGES_OF_ONE_TIME
