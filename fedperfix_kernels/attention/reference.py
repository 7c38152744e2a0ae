"""Prefix attention as its formulas say, in plain PyTorch: the reference for tests and the eager baseline.

    A(q, k, v) = softmax(q kᵀ · scale) v

    gated     A(q, k, v) + g · A(q, p_k, p_v)
    concat    A(q, [k; g·p_k], [v; g·p_v])
    additive  A(q, k + g·p_k, v + g·p_v)

It materialises the [B, H, N, L] scores and works in every floating dtype, float64 included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor, mode: str, scale: float
) -> Tensor:
    """Prefix attention by its definition.

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
    prefix_k = prefix_k.expand(q.shape[0], -1, -1, -1)
    prefix_v = prefix_v.expand(q.shape[0], -1, -1, -1)
    if mode == "gated":
        return _attend(q, k, v, scale) + g * _attend(q, prefix_k, prefix_v, scale)
    if mode == "concat":
        keys = torch.cat([k, g * prefix_k], dim=1)
        values = torch.cat([v, g * prefix_v], dim=1)
        return _attend(q, keys, values, scale)
    return _attend(q, k + g * prefix_k, v + g * prefix_v, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    weights = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)  # [B, H, N, L]
    return (weights @ v).transpose(1, 2)
