"""Linear layers whose implementation can be chosen, for a whole model at once."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fedperfix_kernels.checks import check_choice
from fedperfix_kernels.linear import IMPLEMENTATIONS, linear, resolve_linear


class ChosenLinear(nn.Linear):
    """nn.Linear, with the product that `set_linear` chose; `F.linear` at the start.

    A subclass that computes more calls `self.product(x, weight, bias)`.
    """

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b: [..., C_out] from x [..., C_in]."""
        return self.product(x, self.weight, self.bias)


def set_linear(model: nn.Module, implementation: str) -> None:
    """Choose what multiplies in every nn.Linear of `model`, in place.

    The layers keep their parameters, names and hooks. Subclasses of nn.Linear are left alone, but for those of
    `ChosenLinear`.

    Args:
        model: any module.
        implementation: `torch` for `F.linear`, or `onednn` (see `fedperfix_kernels.linear`).

    Raises:
        ValueError: an unknown name, or `onednn` where PyTorch has no such operator.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    product = linear if resolve_linear(implementation) == "onednn" else F.linear
    for layer in model.modules():
        if type(layer) is nn.Linear and product is linear:
            layer.__class__ = ChosenLinear
        if isinstance(layer, ChosenLinear):
            layer.product = product


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer computes x·Wᵀ + b and nothing else: no subclass's additions, no hooks."""
    return type(layer) in (nn.Linear, ChosenLinear) and not layer._forward_hooks and not layer._forward_pre_hooks
