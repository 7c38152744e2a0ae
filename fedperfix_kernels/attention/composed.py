"""Prefix attention composed of PyTorch's own operations: the fast path where Triton kernels do not run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many keys, float32 training on a CPU is faster with the weights kept than with the fused attention
# (attention/NOTES.md has the figures).
_KEPT_WEIGHTS_FLOAT32 = 128


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
    """Prefix attention from the fastest of PyTorch's operations for the device, dtype and size.

    Args:
        q, k, v, prefix_k, prefix_v, gate, mode, scale, bias, key_mask: as in `reference`.

    Returns:
        [B, N, H, D].
    """
    g = gate.to(q.dtype).view(-1, 1, q.shape[2], 1)  # [1 or B, 1, H, 1], broadcasts over [B, L, H, D]
    prefix_k = prefix_k.expand(q.shape[0], -1, -1, -1)
    prefix_v = prefix_v.expand(q.shape[0], -1, -1, -1)
    mask = _additive_mask(bias, key_mask, q)
    if key_mask is not None:  # an image without keys gets zeros: its softmax would be over the hidden keys
        some_keys = key_mask.any(1)[:, None, None, None]
        v = v * some_keys
        prefix_v = prefix_v * some_keys if mode == "additive" else prefix_v
    if mode == "gated":
        # The gate goes to the prefix values, of which there are no more than outputs.
        branches = [(k, v, mask)]
        if prefix_k.shape[1] or prefix_k.requires_grad or prefix_v.requires_grad:
            branches.append((prefix_k, g * prefix_v, None))
    elif mode == "additive":
        branches = [(torch.addcmul(k, g, prefix_k), torch.addcmul(v, g, prefix_v), mask)]
    else:
        keys, values = torch.cat([k, g * prefix_k], dim=1), torch.cat([v, g * prefix_v], dim=1)
        branches = [(keys, values, None if mask is None else F.pad(mask, (0, prefix_k.shape[1])))]
    attend = _attend_with_kept_weights if _keeps_weights(q, branches) else _attend_fused
    out = attend(q, *branches[0], scale)
    for branch in branches[1:]:
        out = out + attend(q, *branch, scale) if out.requires_grad else out.add_(attend(q, *branch, scale))
    return out


def _additive_mask(bias: Tensor | None, key_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Bias and key mask as one tensor [1 or B, 1 or H, 1 or N, N] to add to the scores."""
    mask = None if bias is None else bias.to(q.dtype)
    if mask is not None and mask.shape[0] > 1:
        mask = mask.repeat(q.shape[0] // mask.shape[0], 1, 1, 1)
    if key_mask is not None:
        # Half of the lowest number: −∞ would make a row without keys NaN.
        lowest = torch.finfo(q.dtype).min / 2
        hidden = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~key_mask[:, None, None, :], lowest)
        mask = hidden if mask is None else mask + hidden
    return mask


def _keeps_weights(q: Tensor, branches: list[tuple[Tensor, Tensor, Tensor | None]]) -> bool:
    """Whether to multiply matrices and keep the [B, H, N, L] weights for the backward pass.

    On a CPU the backward pass of the fused attention is several times slower in half precision at every size, and
    a little slower in float32 for few keys.
    """
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *branches[0][:2], *branches[-1][:2]))
    half = q.dtype in (torch.float16, torch.bfloat16)
    few_keys = max(keys.shape[1] for keys, *_ in branches) <= _KEPT_WEIGHTS_FLOAT32
    return q.device.type == "cpu" and training and (half or few_keys)


def _attend_with_kept_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B·H, N, D]
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)  # [B·H, N, L]
    if mask is not None:
        scores = (scores.unflatten(0, (batch, heads)) + mask).flatten(0, 1)
    return (scores.softmax(dim=-1) @ v).view(batch, heads, tokens, head_dim).transpose(1, 2)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    if k.shape[2] == 0:
        return (q @ k.transpose(-2, -1) @ v).transpose(1, 2)  # no keys: zeros that autograd still connects
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
