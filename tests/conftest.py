"""Shared set-up: kernels run on a GPU if there is one, else in Triton's interpreter; unwritten memory is NaN."""

from __future__ import annotations

import os
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


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's backend runs: the native one on the CPU, others on a GPU if there is one."""
    return torch.device("cuda" if HAS_GPU and _backend(request.node) != "native" else "cpu")


RUNNING_SETS = [] if native.obstacle() else [x for x, state in native.instruction_sets().items() if state == "runs"]


@pytest.fixture(params=RUNNING_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the native kernels that this processor has, one after the other."""
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(None)


def _backend(item: pytest.Item) -> str | None:
    """The `backend` that a test is parametrised with."""
    return item.callspec.params.get("backend") if hasattr(item, "callspec") else None


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if _backend(item) == "native" and native.obstacle():
            item.add_marker(pytest.mark.skip(reason=native.obstacle()))
