"""Shared set-up: kernels run on a GPU if there is one, else in Triton's interpreter; unwritten memory is NaN."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator

# Processes of pytest-xdist share the cores. PyTorch reads this when it starts, here and in processes of tests.
if _WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // _WORKERS))

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before they are imported

from fedperfix_kernels import native  # noqa: E402

# The instruction sets that run here; none where the library of native kernels was not built.
_STATES = {} if native.obstacle() else native.instruction_sets()
INSTRUCTION_SETS = tuple(name for name, state in _STATES.items() if state == "runs")
# Every backend, the native one with every instruction set: for parameters of the fixture `backend`.
BACKENDS = ("triton", *(f"native {name}" for name in INSTRUCTION_SETS or ("",)), "torch", "reference")


@pytest.fixture(params=INSTRUCTION_SETS or ("",))
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native kernels compute with one instruction set after the other."""
    yield from _use(request.param)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, from one of BACKENDS (`indirect=True`)."""
    name, _, instruction_set = request.param.partition(" ")
    if name == "native":
        yield from (name for _ in _use(instruction_set))
    else:
        yield name


def _use(instruction_set: str) -> Iterator[str]:
    if native.obstacle():
        pytest.skip(native.obstacle())
    before = native.instruction_set()
    native.use_instruction_set(instruction_set)
    yield instruction_set
    native.use_instruction_set(before)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's backend runs: the native one on the CPU, others on a GPU if there is one."""
    return torch.device("cuda" if HAS_GPU and not _is_native(request.node) else "cpu")


def _is_native(item: pytest.Item) -> bool:
    """Whether the test is parametrised with the native backend."""
    return hasattr(item, "callspec") and str(item.callspec.params.get("backend")).startswith("native")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty and its relatives return NaN, so that an element that nobody wrote is seen."""

    def poison(function):
        def allocate(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def cpp_compiler() -> None:
    """Skips a test that compiles a model for a processor where there is no C++ compiler."""
    if shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is None:
        pytest.skip("needs a C++ compiler")


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of the files: xdist would leave those with few tests, which take minutes, for the end."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, and start with the files that have slow tests."""
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if _is_native(item) and native.obstacle():
            item.add_marker(pytest.mark.skip(reason=native.obstacle()))
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
