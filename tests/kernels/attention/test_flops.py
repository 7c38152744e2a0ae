"""FLOPs of the operators, counted by PyTorch's counter, against the count of the plain formula's products."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fedperfix_kernels.attention.op  # noqa: F401  (defines the operators)
from fedperfix_kernels.attention.reference import prefix_attention as reference


@pytest.mark.parametrize("mode", ["gated", "concat", "additive"])
def test_both_operators_count_what_the_plain_formula_does(mode: str) -> None:
    batch, tokens, heads, head_dim = 2, 5, 3, 16
    prefix_len = tokens if mode == "additive" else 7
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, tokens, heads, head_dim, generator=generator) for _ in range(3))
    p_k, p_v = (torch.randn(batch, prefix_len, heads, head_dim, generator=generator) for _ in range(2))
    inputs = [x.requires_grad_() for x in (q, k, v, p_k, p_v)]
    with FlopCounterMode(display=False) as plain:
        out = reference(*inputs, torch.ones(heads), mode, 0.25)
        plain_forward = plain.get_total_flops()
        out.sum().backward()
    on_meta = [x.detach().to("meta") for x in inputs]
    options = (torch.ones(heads, device="meta"), None, None, None, mode, 0.25, "triton")
    with FlopCounterMode(display=False) as counter:
        out, lse = torch.ops.fedperfix.prefix_attention(*on_meta, *options)
        forward = counter.get_total_flops()
        qkv, prefix = torch.stack(on_meta[:3], 2), torch.stack(on_meta[3:], 2)
        torch.ops.fedperfix.packed_prefix_attention(qkv, prefix, *options)
        packed = counter.get_total_flops() - forward
        torch.ops.fedperfix.prefix_attention_backward(out, out, lse, *on_meta, *options, True, False)
        backward = counter.get_total_flops() - forward - packed
    assert forward == packed == plain_forward
    # The plain backward keeps the weights; the operator computes the scores again, one of the forward's products.
    assert backward == plain.get_total_flops() - plain_forward + plain_forward // 2
