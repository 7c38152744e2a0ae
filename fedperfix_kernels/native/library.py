"""The library of native kernels: load it, choose an instruction set, run in PyTorch's threads.

The library depends on neither PyTorch nor an OpenMP runtime. It is given two functions of the runtime that PyTorch
has loaded (libgomp on Linux, LLVM's on macOS, Intel's where a distribution builds with it; all three know GCC's
interface): a parallel region, and how many threads `torch.set_num_threads` allows. So there is one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fedperfix_kernels.checks import message

# Slowest first. `portable` is what the compiler's vector extensions give without asking for a set: NEON on AArch64.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
# On AArch64 every processor has NEON; on x86 the baseline is SSE2, which PyTorch's own operations outdo.
PORTABLE_IS_FAST = platform.machine().lower() in ("aarch64", "arm64")
VARIABLE = "FEDPERFIX_INSTRUCTION_SET"
# `enum dtype` of storage.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int8: 4}

PATH = Path(__file__).with_name("_library.so")
_DONE, _NO_MEMORY = 0, 1
_NOT_BUILT, _NOT_HERE, _RUNS = range(3)
# The runtimes that PyTorch is built with, and the names of their files.
_RUNTIMES = ("libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.dylib", "libiomp5.dylib")


@dataclass
class _State:
    """What is loaded, and why nothing is: plain values, which torch.compile can guard on."""

    library: ctypes.CDLL | None = None
    path: Path = PATH
    obstacle: str = ""
    instruction_set: str = ""


_state = _State()


def load(path: Path = PATH) -> None:
    """Load the library, from another file than the installed one if `path` says so; `obstacle` tells why not."""
    _state.library, _state.path, _state.obstacle = None, path, ""
    if not path.exists():
        _state.obstacle = (
            "their library was not built: no C compiler was found at installation; "
            "install gcc or clang and this package again"
        )
        return
    try:
        found = ctypes.CDLL(str(path))
        _use(found, None)
    except (OSError, ValueError) as error:
        _state.obstacle = str(error)
        return
    _use_threads(found)
    if hasattr(os, "register_at_fork"):
        # A forked process has none of the pool's threads and would wait for them for ever.
        os.register_at_fork(after_in_child=lambda: found.fedperfix_use_threads(None, None))
    _state.library = found


def obstacle() -> str:
    """Why the native kernels cannot run in this process; empty if they can."""
    return _state.obstacle


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it cannot run here; the message says why.
    """
    if _state.library is None:
        raise RuntimeError(f"native kernels: {_state.obstacle}")
    return _state.library


def instruction_sets() -> dict[str, str]:
    """Every instruction set by name: `runs`, `not on this processor` or `not built`."""
    states = {_NOT_BUILT: "not built", _NOT_HERE: "not on this processor", _RUNS: "runs"}
    return {name: states[library().fedperfix_set_state(name.encode())] for name in INSTRUCTION_SETS}


def instruction_set() -> str:
    """The instruction set in use; empty if the library is not loaded."""
    return _state.instruction_set


def use_instruction_set(name: str | None) -> None:
    """Compute with another instruction set from now on: for tests, and to find a fault in one.

    Args:
        name: one of `INSTRUCTION_SETS` that runs here, or None for the fastest (or the one that the environment
            variable FEDPERFIX_INSTRUCTION_SET names).

    Raises:
        ValueError: a name that is unknown or does not run here.
    """
    _use(library(), name)


def call(function: str, argument: ctypes.Structure) -> None:
    """Run one of the library's operations.

    Args:
        function: its name without `fedperfix_`.
        argument: the operation's struct.

    Raises:
        MemoryError: there is no memory for what the operation computes with.
    """
    if getattr(library(), f"fedperfix_{function}")(ctypes.byref(argument)) == _NO_MEMORY:
        raise MemoryError(f"native {function}: no memory for scratch space; use fewer threads")


def path() -> Path:
    """Where the library is, or would be."""
    return _state.path


def threads() -> int:
    """How many threads an operation uses."""
    return library().fedperfix_threads()


def runtime() -> str:
    """File of the OpenMP runtime whose threads are used; empty if there is none, and one thread computes."""
    found = _runtime()
    return "" if found is None else str(found._name)


def _use(found: ctypes.CDLL, name: str | None) -> None:
    running = [x for x in INSTRUCTION_SETS if found.fedperfix_set_state(x.encode()) == _RUNS]
    wanted = name if name is not None else os.environ.get(VARIABLE) or running[-1]
    if wanted not in running:
        argument = VARIABLE if name is None else "instruction set"
        raise ValueError(message(argument, repr(wanted), "one that runs here: " + ", ".join(running)))
    found.fedperfix_use_set(wanted.encode())
    _state.instruction_set = wanted


def _use_threads(found: ctypes.CDLL) -> None:
    omp = _runtime()
    found.fedperfix_use_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    if omp is not None:
        region, count = (ctypes.cast(f, ctypes.c_void_p) for f in (omp.GOMP_parallel, omp.omp_get_max_threads))
        found.fedperfix_use_threads(region, count)


@functools.cache
def _runtime() -> ctypes.CDLL | None:
    """The OpenMP runtime that PyTorch has loaded, never another one."""
    if sys.platform == "win32" or not torch.backends.openmp.is_available():
        return None
    bundled = Path(torch.__file__).parent
    files = [*bundled.glob("lib/lib*omp*"), *bundled.parent.glob("torch.libs/lib*omp*")]
    for name in (*map(str, files), *_RUNTIMES):
        try:
            found = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LOCAL)
            if hasattr(found, "GOMP_parallel"):
                return found
        except OSError:  # not loaded
            continue
    return None


load()
