"""Other builds of the native library: with sanitizers, or with instructions emulated that this processor lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(folder: Path, flags: str = "", sets: str = "avx2") -> Path:
    """The library, compiled into `folder` with more flags and for these instruction sets."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("needs a C compiler")
    done = setup(folder, FEDPERFIX_CFLAGS=flags, FEDPERFIX_SETS=sets)
    assert done.returncode == 0, done.stderr
    return folder / "fedperfix_kernels/native/_library.so"


def setup(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the build into `folder` with more variables of the environment."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
    )


def run(script: str, library: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with that library in place of the installed one."""
    start = "from pathlib import Path\nfrom fedperfix_kernels.native import library\n"
    start += f"library.load(Path({str(library)!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", start + script],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
