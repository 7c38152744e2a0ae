"""Prefix attention composed of PyTorch's own operations: the fast path where Triton kernels do not run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor, mode: str, scale: float
) -> Tensor:
    """Prefix attention from scaled_dot_product_attention calls and in-place arithmetic.

    Args:
        q, k, v: [B, N, H, D].
        prefix_k, prefix_v: [B, L, H, D], or [1, L, H, D] when the batch shares the prefix.
        gate: [H].
        mode: `gated`, `concat` or `additive`.
        scale: factor of the scores.

    Returns:
        [B, N, H, D].
    """
    g = gate.to(q.dtype)[:, None]  # [H, 1], broadcasts over [B, L, H, D]
    if mode == "additive":
        return _attend(q, torch.addcmul(k, g, prefix_k), torch.addcmul(v, g, prefix_v), scale)
    prefix_k = prefix_k.expand(q.shape[0], -1, -1, -1)
    prefix_v = prefix_v.expand(q.shape[0], -1, -1, -1)
    if mode == "concat":
        return _attend(q, torch.cat([k, g * prefix_k], dim=1), torch.cat([v, g * prefix_v], dim=1), scale)
    out = _attend(q, k, v, scale)
    prefix_out = _attend(q, prefix_k, prefix_v, scale)
    if out.requires_grad or prefix_out.requires_grad or g.requires_grad:
        return torch.addcmul(out, g, prefix_out)  # autograd keeps both branches: no place to write into
    return out.addcmul_(g, prefix_out)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    if k.shape[2] == 0:
        return (q @ k.transpose(-2, -1) @ v).transpose(1, 2)  # no keys: zeros that autograd still connects
    half_on_cpu = q.device.type == "cpu" and q.dtype in (torch.float16, torch.bfloat16)
    if half_on_cpu and (q.requires_grad or k.requires_grad or v.requires_grad):
        # The backward pass of the CPU's fused attention is several times slower than the products in half
        # precision (bench/bench_attention.py shows both), so the scores are materialised here.
        weights = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)  # [B, H, N, L]
        return (weights @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
