"""Shared set-up: kernels run on a GPU if there is one, else in Triton's interpreter; unwritten memory is NaN."""

from __future__ import annotations

import os

# Processes of pytest-xdist share the cores. PyTorch reads this when it starts, here and in processes of tests.
if _WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // _WORKERS))

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before they are imported


@pytest.fixture
def device() -> torch.device:
    """Where the triton backend runs in this test session."""
    return torch.device("cuda" if HAS_GPU else "cpu")


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
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
