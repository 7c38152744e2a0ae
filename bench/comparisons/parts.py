"""The parts of a training step, each alone: forward and backward through every layer, on a real step's tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fedperfix_kernels import packed_prefix_attention

Piece = tuple[Callable[..., Tensor], tuple[Tensor, ...]]  # a function and its inputs


def step_parts(
    network: nn.Module,
    images: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
    optimizer: torch.optim.Optimizer,
    zero_gradients: Callable[[], None],
) -> dict[str, Callable[[int], None]]:
    """What a step of a ViT with prefixes consists of, but for norms, residuals, patches, head and loss.

    Args:
        network: a timm ViT after `apply_prefix`, of this function alone: its gradients are accumulated into.
        images: [B, 3, S, S]; a forward pass over them gives the parts their inputs.
        autocast: makes the context of a forward pass.
        optimizer, zero_gradients: of the network.

    Returns:
        Per part a function of an index, which is ignored; it runs the part of all layers, forward and backward.
    """
    pieces: dict[str, list[Piece]] = {"attention": [], "adapter": [], "projections": [], "MLP": []}
    seen = _inputs_and_outputs(network, images, autocast)
    for block in network.blocks:
        attn = block.attn
        (x,), qkv = seen[attn.qkv]
        (heads_out,), _ = seen[attn.proj]
        (normed,), _ = seen[block.mlp]
        _, pair = seen[attn.prefix]
        packed = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim))
        pieces["attention"].append((_attention(attn), (packed, pair)))
        pieces["adapter"].append((attn.prefix, (x,)))
        pieces["projections"] += [(attn.qkv, (x,)), (attn.proj, (heads_out,))]
        pieces["MLP"].append((block.mlp, (normed,)))

    def update(_: int) -> None:
        optimizer.step()
        zero_gradients()

    parts = {name: _part(layers, autocast) for name, layers in pieces.items()}
    return parts | {"optimizer": update}


def _attention(attn: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def function(qkv: Tensor, pair: Tensor) -> Tensor:
        return packed_prefix_attention(
            qkv, pair, attn.prefix.gate, mode=attn.mode, scale=attn.scale, backend=attn.backend
        )

    return function


def _inputs_and_outputs(
    network: nn.Module, images: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[nn.Module, tuple[tuple[Tensor, ...], Tensor]]:
    """What goes into and out of every module in one forward pass, in the pass's own dtypes and strides."""
    seen: dict[nn.Module, tuple[tuple[Tensor, ...], Tensor]] = {}

    def see(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen[module] = tuple(x for x in inputs if isinstance(x, Tensor)), output

    hooks = [module.register_forward_hook(see) for module in network.modules()]
    with torch.no_grad(), autocast():
        network(images)
    for hook in hooks:
        hook.remove()
    return seen


def _part(pieces: list[Piece], autocast: Callable[[], AbstractContextManager[Any]]) -> Callable[[int], None]:
    """Run every piece forward and backward; gradients of parameters accumulate as in a step."""
    pieces = [(function, tuple(x.detach().requires_grad_() for x in inputs)) for function, inputs in pieces]
    with torch.no_grad(), autocast():
        gradients = [torch.randn_like(function(*inputs)) for function, inputs in pieces]

    def run(_: int) -> None:
        for (function, inputs), gradient in zip(pieces, gradients, strict=True):
            for x in inputs:
                x.grad = None  # a step keeps no gradient of an activation
            with autocast():
                out = function(*inputs)
            out.backward(gradient)

    return run
