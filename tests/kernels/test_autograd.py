"""Forward-mode derivatives of our operators: right or refused, with and without torch.no_grad."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from fedperfix_kernels import native, packed_prefix_attention
from fedperfix_kernels.activation import gelu, tanh
from fedperfix_kernels.linear import linear, onednn_obstacle

WEIGHT = torch.linspace(-1, 1, 12).view(3, 4)
PREFIX = torch.linspace(-1, 1, 64).view(1, 2, 2, 2, 8)


def attention(backend: str) -> Callable[[Tensor], Tensor]:
    return lambda x: packed_prefix_attention(x.view(1, 2, 3, 2, 8), PREFIX, 0.5, backend=backend)


# What computes, what PyTorch composes for it, and the input's shape.
CASES = {
    "attention": (attention("native"), attention("reference"), (96,)),
    "gelu": (gelu, F.gelu, (3, 4)),
    "tanh": (tanh, torch.tanh, (3, 4)),
    "linear": (lambda x: linear(x, WEIGHT), lambda x: F.linear(x, WEIGHT), (3, 4)),
}


def by_dual_numbers(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def by_jvp(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


@pytest.mark.skipif(bool(native.obstacle() or onednn_obstacle()), reason=native.obstacle() or onednn_obstacle())
@pytest.mark.parametrize("derive", [by_dual_numbers, by_jvp])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_forward_derivatives_are_right_or_refused(case: str, grad: bool, derive) -> None:
    function, expected, shape = CASES[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(grad):
        try:
            found = derive(function, x)
        except NotImplementedError:  # "You must implement the jvp function"
            return
        torch.testing.assert_close(found, derive(expected, x))
