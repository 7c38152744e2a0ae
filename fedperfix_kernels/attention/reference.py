"""Prefix attention as its formulas say, in plain PyTorch: the reference for tests and the eager baseline.

    A(q, k, v) = softmax(q kᵀ · scale + bias) v

    gated     A(q, k, v) + g · A(q, p_k, p_v)
    concat    A(q, [k; g·p_k], [v; g·p_v])
    additive  A(q, k + g·p_k, v + g·p_v)

The bias and the key mask concern the base branch's keys only. It materialises the [B, H, N, L] scores and works in
every floating dtype, float64 included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor,
    mode: str,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Prefix attention by its definition.

    Args:
        q, k, v: [B, N, H, D].
        prefix_k, prefix_v: [B, L, H, D], or [1, L, H, D] when the batch shares the prefix.
        gate: [H], or [B, H] when each image has its own.
        mode: `gated`, `concat` or `additive`.
        scale: factor of the scores.
        bias: [G, H, N, N], added to the scores of the base branch; image b has bias b mod G.
        key_mask: bool [B, N], False for tokens that are no keys.

    Returns:
        [B, N, H, D].
    """
    g = gate.to(q.dtype).view(-1, 1, q.shape[2], 1)  # [1 or B, 1, H, 1], broadcasts over [B, L, H, D]
    prefix_k = prefix_k.expand(q.shape[0], -1, -1, -1)
    prefix_v = prefix_v.expand(q.shape[0], -1, -1, -1)
    if mode == "gated":
        return _attend(q, k, v, scale, bias, key_mask) + g * _attend(q, prefix_k, prefix_v, scale)
    if mode == "concat":
        keys = torch.cat([k, g * prefix_k], dim=1)
        values = torch.cat([v, g * prefix_v], dim=1)
        length = prefix_k.shape[1]
        bias = None if bias is None else F.pad(bias, (0, length))
        key_mask = None if key_mask is None else F.pad(key_mask, (0, length), value=True)
        return _attend(q, keys, values, scale, bias, key_mask)
    return _attend(q, k + g * prefix_k, v + g * prefix_v, scale, bias, key_mask)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, key_mask: Tensor | None = None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    scores = q @ k.transpose(-2, -1) * scale  # [B, H, N, L]
    if bias is not None:
        scores = scores + bias.to(q.dtype).repeat(q.shape[0] // bias.shape[0], 1, 1, 1)
    if key_mask is None:
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)
    m_keys = key_mask[:, None, None, :]
    # The lowest finite number instead of −∞, and zero afterwards: an image without keys gets zeros, not NaN.
    weights = scores.masked_fill(~m_keys, torch.finfo(scores.dtype).min).softmax(dim=-1) * m_keys
    return (weights @ v).transpose(1, 2)
