"""Which implementation runs, and what is said about it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fedperfix_kernels import backends, explain, native

CPU = torch.device("cpu")


@pytest.mark.parametrize(("obstacle", "expected"), [("", "native"), ("no library", "torch")])
def test_auto_on_a_cpu_is_never_the_interpreter(obstacle: str, expected: str, monkeypatch) -> None:
    monkeypatch.setattr(native, "obstacle", lambda: obstacle)
    monkeypatch.setattr(native, "instruction_set", lambda: "avx2")
    assert backends.resolve(None, CPU) == expected
    assert backends.resolve("auto", CPU) == expected


def test_auto_is_torch_for_what_the_native_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "obstacle", lambda: "")
    assert backends.resolve("auto", CPU, "they do not take it") == "torch"
    with pytest.raises(ValueError, match="backend: got 'native', but they do not take it; use backend='torch'"):
        backends.resolve("native", CPU, "they do not take it")


def test_native_refuses_tensors_of_other_devices() -> None:
    with pytest.raises(ValueError, match="backend: got 'native', but the tensors are on 'meta'"):
        backends.resolve("native", torch.device("meta"))


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    gpu = SimpleNamespace(name="Some GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "HAS_TRITON", True)


def test_auto_is_torch_on_a_gpu_that_triton_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 has no bfloat16 and no Triton: it runs PyTorch's operations, and an explicit choice says why not."""
    pretend_gpu(monkeypatch, 7, 5)
    cuda = torch.device("cuda")
    assert backends.resolve("auto", cuda) == "torch"
    assert "needs compute capability 8.0 or newer and Some GPU has 7.5" in explain("auto", cuda)
    with pytest.raises(ValueError, match=r"backend: got 'triton', but Triton needs .*; use backend='torch'"):
        backends.resolve("triton", cuda)


def test_auto_is_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, 8, 6)
    assert backends.resolve("auto", torch.device("cuda")) == "triton"
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert backends.resolve("auto", torch.device("cuda")) == "torch"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_an_explicit_choice_is_obeyed(name: str) -> None:
    assert backends.resolve(name, CPU) == name
    assert backends.resolve(name, torch.device("cuda")) == name


def test_an_explicit_choice_is_refused_rather_than_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="the triton package is not installed; use backend='torch'"):
        backends.resolve("triton", torch.device("cuda"))


def test_explain_says_what_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "obstacle", lambda: "no library")
    assert explain("auto", CPU) == "torch (PyTorch's own operations, composed: no library)"
    monkeypatch.setattr(native, "obstacle", lambda: "")
    monkeypatch.setattr(native, "instruction_set", lambda: "avx2")
    assert explain("auto", CPU) == "native (C kernels, instruction set avx2)"
    assert explain("reference", CPU) == "reference (asked for)"


@pytest.mark.slow
def test_works_where_triton_does_not_exist() -> None:
    """As on macOS and Windows: import and both other backends, with the triton package hidden."""
    script = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError("No module named 'triton'", name=name)
import importlib.util
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else original(name, *rest)
sys.meta_path.insert(0, Hide())
import torch
import fedperfix_kernels as kernels
x = torch.randn(2, 5, 3, 8)
for backend in ("auto", "torch", "reference"):
    assert kernels.prefix_attention(x, x, x, x, x, 0.5, backend=backend).isfinite().all()
    mean = kernels.aggregate(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), [1, 3], backend=backend)
    assert mean.tolist() == [2.5, 5.0]
try:
    kernels.prefix_attention(x, x, x, x, x, 0.5, backend="triton")
except ValueError as error:
    assert "not installed" in str(error), error
else:
    raise AssertionError("backend='triton' was not refused")
assert "triton" not in sys.modules
print("fine")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "fine", result.stderr
