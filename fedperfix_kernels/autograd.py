"""Our operators in eager training: what a call costs beyond its kernel.

PyTorch runs an autograd.Function with a `setup_context`, and the formula that `register_autograd` attaches, at
several times the cost of a plain Function. Tracing and torch.func need one of the former; everybody else gets the
latter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def is_eager() -> bool:
    """Whether neither torch.compile nor torch.func looks on."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def wants_derivative() -> bool:
    """Whether PyTorch may ask for a derivative of what is computed now, backward or forward.

    `torch.no_grad` ends the former only: dual numbers keep their tangents in it.
    """
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def eager_function(
    name: str, forward: Callable[..., Any], save: Callable[..., None], gradients: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """A plain autograd.Function.

    Args:
        name: what profiles call it.
        forward: what it computes, from all of its inputs.
        save: called as `save(ctx, inputs, output)`, as a `setup_context` is.
        gradients: its backward pass.
    """

    def forward_and_save(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        save(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(gradients)}
    return type(name, (torch.autograd.Function,), methods)
