"""Linear layers in float32 on a processor, by PyTorch's own `F.linear` or by the oneDNN that PyTorch carries.

`F.linear` multiplies float32 matrices with MKL, which keeps to AVX2 on AMD processors. From Zen 5 on AVX-512 is
twice as wide as that, and half of the machine is idle; oneDNN uses all of it. PyTorch has an operator for oneDNN's
product, without a gradient; `torch.ops.fedperfix.linear` is that operator with gradients, vmap and a fake. Both
gradients of a linear layer are such products too, so one operator is enough. docs/linear-layers.md has figures.
"""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedperfix_kernels.autograd import eager_function, is_eager, wants_derivative
from fedperfix_kernels.checks import check_choice, describe, message

IMPLEMENTATIONS = ("torch", "onednn")
CHOICES = ("auto", *IMPLEMENTATIONS)
_ZEN5 = 26  # AMD's family number; Zen 4 has AVX-512 too, but computes it in two halves

_library = torch.library.Library("fedperfix", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b by oneDNN: what `F.linear` computes, to rounding.

    Anything but float32 on a processor outside of autocast, and what has no elements, goes to `F.linear` itself.

    Args:
        x: [..., C_in].
        weight: [C_out, C_in].
        bias: [C_out], or None.

    Returns:
        [..., C_out].

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: this PyTorch has no oneDNN (see `onednn_obstacle`).
    """
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    if not wants_derivative():
        return _product(x, weight, bias)
    return (_EagerLinear if is_eager() else _Linear).apply(x, weight, bias)


def resolve_linear(wanted: str = "auto") -> str:
    """Name the implementation of float32 linear layers on this machine's processor.

    `auto` goes by the processor and by the libraries in PyTorch, never by a clock: the bits of a run depend on it.

    Args:
        wanted: one of `CHOICES`.

    Raises:
        ValueError: an unknown name, or `onednn` where PyTorch has no such operator.
    """
    check_choice("linear", wanted, CHOICES)
    obstacle = onednn_obstacle()
    if wanted == "auto":
        return "onednn" if not obstacle and _mkl_is_slow() else "torch"
    if wanted == "onednn" and obstacle:
        raise ValueError(f"linear: got 'onednn', but {obstacle}; use 'torch' or 'auto'")
    return wanted


def onednn_obstacle() -> str:
    """Why oneDNN's product cannot be used in this process; empty if it can."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ""
    return "this build of PyTorch has no oneDNN operator for linear layers"


def _mkl_is_slow() -> bool:
    return (
        torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and _is_amd_from(_ZEN5, _processor())
    )


def _is_amd_from(family: int, processor: str) -> bool:
    """Whether a processor, described as Linux or Windows does it, is AMD's and of this family or a later one."""
    number = re.search(r"family\s*:?\s*(\d+)", processor, re.IGNORECASE)
    return "AuthenticAMD" in processor and number is not None and int(number.group(1)) >= family


@functools.cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text().partition("\n\n")[0] if cpuinfo.exists() else platform.processor()


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and weight.numel() > 0
    )


# The operator -------------------------------------------------------------------------------------------------


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operator; outside of what traces or maps it the work itself, as a layer of a small model takes no longer
    than PyTorch's way to an operator in Python."""
    return _multiply(x, weight, bias) if is_eager() else torch.ops.fedperfix.linear(x, weight, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    fits = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    if not fits:
        raise ValueError(message("x", describe(x), f"shape [..., C_in] for a weight of {tuple(weight.shape)}"))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(message("bias", describe(bias), f"shape [{weight.shape[0]}]"))
    rows = x if x.dim() > 1 else x[None]
    out = torch.ops.mkldnn._linear_pointwise.default(rows, _with_rows(weight), bias, "none", [], "")
    return out if x.dim() > 1 else out[0]


def _with_rows(weight: Tensor) -> Tensor:
    """`weight`, copied if neither its rows nor its columns lie in memory one after the other without overlap."""
    return weight if 1 in weight.stride() and 0 not in weight.stride() else weight.contiguous()


_library.impl("linear", _multiply, "CPU")


@torch.library.register_fake("fedperfix::linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    rows = dout.reshape(-1, dout.shape[-1])
    dx = linear(dout, weight.t()) if need_x else None
    dweight = linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if need_weight else None
    return dx, dweight, rows.sum(0) if need_bias else None


class _Linear(torch.autograd.Function):
    """The operator for autograd and torch.func; `attention/op.py` says why it is there as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.no_grad():  # torch.func leaves gradients on in here
            return _product(x, weight, bias)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)


_EagerLinear = eager_function("Linear", _multiply, _save, _gradients)

torch.library.register_autograd("fedperfix::linear", _gradients, setup_context=_save, lib=_library)


@torch.library.register_vmap("fedperfix::linear", lib=_library)
def _(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    """One product for all rows where they share the weights, else a batched one."""
    copies = info.batch_size
    x = x.expand(copies, *x.shape) if dims[0] is None else x.movedim(dims[0], 0)
    if dims[1] is None and (bias is None or dims[2] is None):
        return torch.ops.fedperfix.linear(x, weight, bias), 0
    weight = weight.expand(copies, *weight.shape) if dims[1] is None else weight.movedim(dims[1], 0)
    rows = x.reshape(copies, -1, x.shape[-1])
    if bias is None:
        out = torch.bmm(rows, weight.mT)
    else:
        bias = bias.expand(copies, -1) if dims[2] is None else bias.movedim(dims[2], 0)
        out = torch.baddbmm(bias[:, None], rows, weight.mT)
    return out.reshape(*x.shape[:-1], weight.shape[1]), 0
