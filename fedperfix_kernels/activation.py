"""GELU and tanh in one pass over memory, by the native kernels.

PyTorch's own take several times as long as reading and writing does on a processor. The operators here are for
eager training in float32 and half precision. A compiler fuses activations with what is around them, so under
`torch.compile` `gelu` and `tanh` are PyTorch's; under `torch.func` too, where there are gradients.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_vmap

from fedperfix_kernels import native
from fedperfix_kernels.autograd import eager_function, is_eager, wants_derivative
from fedperfix_kernels.checks import check_tensor, describe, message
from fedperfix_kernels.native import library

_library = torch.library.Library("fedperfix", "FRAGMENT")
_library.define("gelu(Tensor x) -> Tensor")
_library.define("gelu_backward(Tensor dout, Tensor x) -> Tensor")
_library.define("tanh(Tensor x) -> Tensor")


class _Call(ctypes.Structure):
    """`struct elementwise` of library.h, field by field."""

    _fields_ = (("x", c_void_p), ("dout", c_void_p), ("out", c_void_p), ("count", c_int64), ("dtype", c_int32))


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x), the exact GELU: what `F.gelu(x)` computes, to rounding.

    Args:
        x: any shape.

    Raises:
        TypeError: x is no tensor.
    """
    check_tensor("x", x)
    return _computed(x, _Gelu, torch.ops.fedperfix.gelu) if _is_for_native(x) else F.gelu(x)


def tanh(x: Tensor) -> Tensor:
    """tanh(x): what `torch.tanh` computes, to rounding.

    Args:
        x: any shape.

    Raises:
        TypeError: x is no tensor.
    """
    check_tensor("x", x)
    return _computed(x, _Tanh, torch.ops.fedperfix.tanh) if _is_for_native(x) else torch.tanh(x)


def _computed(x: Tensor, eager: type[torch.autograd.Function], operator: Any) -> Tensor:
    return eager.apply(x) if is_eager() else operator(x)


def _is_for_native(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and (is_eager() or not wants_derivative())
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)  # the library's float64 is for tests
        and not native.obstacle()
    )


# The operators ------------------------------------------------------------------------------------------------


def _run(function: str, x: Tensor, dout: Tensor | None = None) -> Tensor:
    if x.device.type != "cpu" or not x.is_floating_point() or x.dtype not in library.DTYPES:
        raise ValueError(message("x", describe(x), "float32, bfloat16, float16 or float64 on a CPU"))
    x = x.contiguous()
    out = torch.empty_like(x)
    call = _Call(x.data_ptr(), None, out.data_ptr(), x.numel(), library.DTYPES[x.dtype])
    if dout is not None:
        if dout.shape != x.shape or dout.dtype is not x.dtype:
            raise ValueError(message("dout", describe(dout), f"shape and dtype of x, which are {describe(x)}"))
        dout = dout.contiguous()
        call.dout = dout.data_ptr()
    library.call(function, call)
    return out


_library.impl("gelu", lambda x: _run("gelu_forward", x), "CPU")
_library.impl("gelu_backward", lambda dout, x: _run("gelu_backward", x, dout), "CPU")
_library.impl("tanh", lambda x: _run("tanh_forward", x), "CPU")


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.register_fake("fedperfix::gelu", _fake, lib=_library)
torch.library.register_fake("fedperfix::gelu_backward", lambda dout, x: _fake(x), lib=_library)
torch.library.register_fake("fedperfix::tanh", _fake, lib=_library)


def _mapped(operator: Any) -> Any:
    """vmap of an elementwise operator: the mapped dimension stays where it is."""

    def rule(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return operator(x), dims[0]

    return rule


register_vmap("fedperfix::gelu", _mapped(torch.ops.fedperfix.gelu), lib=_library)
register_vmap("fedperfix::tanh", _mapped(torch.ops.fedperfix.tanh), lib=_library)


def _save_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_gradient(ctx: Any, dout: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # PyTorch's has a derivative of its own
        return torch.ops.aten.gelu_backward(dout, x)
    return torch.ops.fedperfix.gelu_backward(dout, x)


def _save_output(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _tanh_gradient(ctx: Any, dout: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward(dout, *ctx.saved_tensors)  # one pass already


_Gelu = eager_function("Gelu", torch.ops.fedperfix.gelu.default, _save_input, _gelu_gradient)
_Tanh = eager_function("Tanh", torch.ops.fedperfix.tanh.default, _save_output, _tanh_gradient)
torch.library.register_autograd("fedperfix::gelu", _gelu_gradient, setup_context=_save_input, lib=_library)
torch.library.register_autograd("fedperfix::tanh", _tanh_gradient, setup_context=_save_output, lib=_library)
