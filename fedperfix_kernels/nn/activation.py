"""Activations by the native kernels, for a whole model at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedperfix_kernels import native
from fedperfix_kernels.activation import gelu, tanh
from fedperfix_kernels.checks import check_choice
from fedperfix_kernels.nn.prefixes import AdapterPrefix

ACTIVATIONS = ("torch", "native")


class NativeGELU(nn.GELU):
    """nn.GELU in its exact form, by the native kernel on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """x·Φ(x), of any shape."""
        return gelu(x)


def set_activations(model: nn.Module, implementation: str) -> None:
    """Choose what computes every exact nn.GELU and the tanh of every adapter in `model`, in place.

    Under `torch.compile`, and under `torch.func` where there are gradients, they are PyTorch's in any case.

    Args:
        model: any module.
        implementation: `torch` or `native`.

    Raises:
        ValueError: an unknown name, or `native` where the library cannot run.
    """
    check_choice("implementation", implementation, ACTIVATIONS)
    if implementation == "native" and native.obstacle():
        raise ValueError(f"implementation: got 'native', but {native.obstacle()}; use 'torch'")
    ours = implementation == "native"
    for module in model.modules():
        if type(module) in (nn.GELU, NativeGELU) and module.approximate == "none":
            module.__class__ = NativeGELU if ours else nn.GELU
        elif isinstance(module, AdapterPrefix):
            module.activation = tanh if ours else torch.tanh
