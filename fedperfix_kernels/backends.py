"""Which implementation of an operation runs: `triton`, `native`, `torch` or `reference`.

An explicit choice is obeyed or refused, never replaced. `auto` picks `triton` for tensors on a GPU that Triton
supports, `native` for tensors of a CPU where the library of C kernels was built, has vectors for the processor and
takes the call, and `torch` everywhere else; `explain` says what it picks and why.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from fedperfix_kernels import native
from fedperfix_kernels.checks import check_choice

BACKENDS = ("auto", "triton", "native", "torch", "reference")


# The triton package does not exist for macOS and Windows; the other backends work there.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter, for tests only. Triton reads the variable when a kernel is defined, so read it once.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def resolve(backend: str | None, device: torch.device, native_limit: str = "") -> str:
    """Name the implementation that runs for tensors on `device`.

    Args:
        backend: one of `BACKENDS`; None means `auto`.
        device: where the operation's tensors are.
        native_limit: why the native kernels cannot take these tensors, as a clause; empty if they can.

    Returns:
        `triton`, `native`, `torch` or `reference`.

    Raises:
        ValueError: an unknown name, or `triton` or `native` where it cannot run.
    """
    backend = "auto" if backend is None else backend
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        if device.type == "cuda":
            return "torch" if _triton_obstacle(device) else "triton"
        return "torch" if native_limit or _native_obstacle(device) or _slow_vectors() else "native"
    obstacle = ""
    if backend == "triton":
        obstacle = _triton_obstacle(device)
    elif backend == "native":
        obstacle = _native_obstacle(device) or native_limit
    if obstacle:
        raise ValueError(f"backend: got '{backend}', but {obstacle}; use backend='torch' or 'auto'")
    return backend


def explain(backend: str | None, device: torch.device) -> str:
    """One line for people: the implementation that `resolve` names, and the reason."""
    name = resolve(backend, device)
    if backend not in (None, "auto"):
        return f"{name} (asked for)"
    if name == "triton":
        return f"triton (fused kernels on {torch.cuda.get_device_name(device)})"
    if name == "native":
        return f"native (C kernels, instruction set {native.instruction_set()})"
    if device.type == "cuda":
        return f"torch ({_triton_obstacle(device)})"
    why = _native_obstacle(device) or _slow_vectors()
    return f"torch (PyTorch's own operations, composed: {why})"


def _native_obstacle(device: torch.device) -> str:
    if device.type != "cpu":
        return f"the tensors are on '{device.type}' and native kernels need them on the CPU"
    return native.obstacle()


def _slow_vectors() -> str:
    """Why PyTorch's operations are faster than the native kernels; empty if they are not."""
    if native.instruction_set() == "portable" and not native.PORTABLE_IS_FAST:
        return "the processor has no AVX2, for which the native kernels are made"
    return ""


def _triton_obstacle(device: torch.device) -> str:
    if not HAS_TRITON:
        return "the triton package is not installed"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(device)
        if gpu.major < 8:
            return f"Triton needs compute capability 8.0 or newer and {gpu.name} has {gpu.major}.{gpu.minor}"
    if device.type == "cuda" or (device.type == "cpu" and INTERPRETING):
        return ""
    return f"the tensors are on '{device.type}' and Triton kernels need a GPU"
