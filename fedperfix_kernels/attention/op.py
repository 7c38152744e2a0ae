"""The Triton implementation as PyTorch operators, so that autograd, torch.compile and opcheck know it.

Two forward operators share one backward operator: `prefix_attention` takes q, k, v, p_k, p_v apart, and
`packed_prefix_attention` takes the outputs of the two projections as they are, so that their gradients are
written once, already packed.

The gradient formulas are attached twice. An autograd.Function around each forward operator is what users call: it
works under `torch.func` as well and costs less per call. The same formulas are registered on the operators, for
`torch.ops` and tracing; without that, `torch.compile(torch.func.grad(...))` would silently return zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_library = torch.library.Library("fedperfix", "FRAGMENT")
_library.define(
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor gate, "
    "str mode, float scale) -> (Tensor, Tensor)"
)
_library.define(
    "packed_prefix_attention(Tensor qkv, Tensor prefix, Tensor gate, str mode, float scale) -> (Tensor, Tensor)"
)
_library.define(
    "prefix_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
    "Tensor gate, Tensor out, Tensor lse, str mode, float scale, bool need_prefix) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor, mode: str, scale: float
) -> tuple[Tensor, Tensor]:
    from fedperfix_kernels.attention import triton_launch  # only here: triton may not be installed

    return triton_launch.forward(q, k, v, prefix_k, prefix_v, gate, mode, scale)


def _packed_forward(qkv: Tensor, prefix: Tensor, gate: Tensor, mode: str, scale: float) -> tuple[Tensor, Tensor]:
    return _forward(*qkv.unbind(2), *prefix.unbind(2), gate, mode, scale)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor,
    out: Tensor,
    lse: Tensor,
    mode: str,
    scale: float,
    need_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fedperfix_kernels.attention import triton_launch

    if dout.stride(-1) != 1:  # for example the expanded gradient of out.sum()
        dout = dout.contiguous()
    return triton_launch.backward(dout, q, k, v, prefix_k, prefix_v, gate, out, lse, mode, scale, need_prefix)


_library.impl("prefix_attention", _forward, "CompositeExplicitAutograd")
_library.impl("packed_prefix_attention", _packed_forward, "CompositeExplicitAutograd")
_library.impl("prefix_attention_backward", _backward, "CompositeExplicitAutograd")


# Shapes and dtypes without data -----------------------------------------------------------------------------


@torch.library.register_fake("fedperfix::prefix_attention")
def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor, mode: str, scale: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    branches = 2 if mode == "gated" else 1
    return q.new_empty(q.shape), gate.new_empty((branches, batch, heads, tokens))


@torch.library.register_fake("fedperfix::packed_prefix_attention")
def _fake_packed_forward(
    qkv: Tensor, prefix: Tensor, gate: Tensor, mode: str, scale: float
) -> tuple[Tensor, Tensor]:
    return _fake_forward(*qkv.unbind(2), *prefix.unbind(2), gate, mode, scale)


@torch.library.register_fake("fedperfix::prefix_attention_backward")
def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor,
    out: Tensor,
    lse: Tensor,
    mode: str,
    scale: float,
    need_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, head_dim = q.shape
    prefix_shape = (prefix_k.shape[0], prefix_k.shape[1]) if need_prefix or mode == "additive" else (0, 0)
    return (
        q.new_empty((batch, tokens, 3, heads, head_dim)),
        q.new_empty((*prefix_shape, 2, heads, head_dim)),
        gate.new_empty(gate.shape),
    )


# Gradients --------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, prefix_k, prefix_v, gate, ctx.mode, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, prefix_k, prefix_v, gate, *output)
    ctx.set_materialize_grads(False)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, prefix, gate, ctx.mode, ctx.scale = inputs
    ctx.save_for_backward(qkv, prefix, gate, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    q, k, v, prefix_k, prefix_v, gate, out, lse = ctx.saved_tensors
    need_prefix = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    dqkv, dprefix, dgate = torch.ops.fedperfix.prefix_attention_backward(
        dout, q, k, v, prefix_k, prefix_v, gate, out, lse, ctx.mode, ctx.scale, need_prefix
    )
    dprefix_k, dprefix_v = dprefix.unbind(2) if need_prefix else (None, None)
    return *dqkv.unbind(2), dprefix_k, dprefix_v, dgate, None, None


def _packed_gradients(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    qkv, prefix, gate, out, lse = ctx.saved_tensors
    need_prefix = ctx.needs_input_grad[1]
    dqkv, dprefix, dgate = torch.ops.fedperfix.prefix_attention_backward(
        dout, *qkv.unbind(2), *prefix.unbind(2), gate, out, lse, ctx.mode, ctx.scale, need_prefix
    )
    return dqkv, dprefix if need_prefix else None, dgate, None, None


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "prefix attention's fused backward has no derivative of its own; for second derivatives use "
        "backend='torch' or 'reference'"
    )


class PrefixAttentionFunction(torch.autograd.Function):
    """`torch.ops.fedperfix.prefix_attention` for autograd and torch.func; returns (out, lse)."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # torch.func leaves gradients on in here
            return torch.ops.fedperfix.prefix_attention(*inputs)

    setup_context = staticmethod(_save)
    backward = staticmethod(once_differentiable(_gradients))


class PackedPrefixAttentionFunction(torch.autograd.Function):
    """`torch.ops.fedperfix.packed_prefix_attention` for autograd and torch.func; returns (out, lse)."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return torch.ops.fedperfix.packed_prefix_attention(*inputs)

    setup_context = staticmethod(_save_packed)
    backward = staticmethod(once_differentiable(_packed_gradients))


torch.library.register_autograd("fedperfix::prefix_attention", _gradients, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "fedperfix::packed_prefix_attention", _packed_gradients, setup_context=_save_packed, lib=_library
)
torch.library.register_autograd("fedperfix::prefix_attention_backward", _no_second_derivative, lib=_library)
