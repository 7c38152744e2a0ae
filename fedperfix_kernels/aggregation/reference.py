"""Aggregation by its formulas, in any dtype: the reference for tests and the eager baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedperfix_kernels.arena import BLOCK


def weighted_mean(
    tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor, nonfinite: Tensor | None = None
) -> None:
    """out = Σ_k w_k x_k / Σ_k w_k, accumulated in float32 (float64 for float64 storage).

    Args:
        tensors: K tensors of one shape, one per client.
        weights: K numbers.
        out: the tensors' shape; written.
        nonfinite: bool [K]; a client with a non-finite value becomes True. Or None.
    """
    accumulate = _accumulation(out)
    total = torch.zeros(out.shape, dtype=accumulate, device=out.device)
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + tensor.to(accumulate) * weight
    out.copy_(total / sum(weights))
    if nonfinite is not None:
        nonfinite.logical_or_(torch.stack([~tensor.isfinite().all() for tensor in tensors]))


def aggregate_rows(
    uploads: Tensor,
    weights: Tensor,
    bounds: Sequence[tuple[int, int]],
    out: Tensor,
    nonfinite: Tensor | None = None,
) -> None:
    """`weighted_mean` of the rows of `uploads` [K, P], layer by layer.

    Args:
        uploads: [K, P].
        weights: [K, layers] on the CPU, not normalised.
        bounds: first and last element (exclusive) of each layer.
        out: [P]; written.
        nonfinite: as in `weighted_mean`.
    """
    for layer, (start, end) in enumerate(bounds):
        rows = [row[start:end] for row in uploads]
        weighted_mean(rows, weights[:, layer].tolist(), out[start:end], nonfinite)


def trimmed_mean(uploads: Tensor, trim: int, out: Tensor) -> None:
    """Mean of each coordinate's sorted values without `trim` at each end; NaN where any is NaN.

    Args:
        uploads: [K, P].
        trim: less than K / 2.
        out: [P]; written.
    """
    ordered = uploads.to(_accumulation(uploads)).sort(0).values
    mean = ordered[trim : len(ordered) - trim].mean(0)
    out.copy_(torch.where(uploads.isnan().any(0), torch.nan, mean))


def updates(uploads: Tensor, center: Tensor) -> Tensor:
    """x_k − center in the accumulation dtype. uploads: [K, P]; center: [P]."""
    return uploads.to(_accumulation(uploads)) - center


def squared_norms(uploads: Tensor, center: Tensor) -> Tensor:
    """Float64 [K]: ‖x_k − center‖². uploads: [K, P]; center: [P]."""
    return updates(uploads, center).double().square().sum(1)


def squared_distances(uploads: Tensor, center: Tensor) -> Tensor:
    """Float64 [K, K]: ‖x_j − x_k‖². uploads: [K, P]; center: [P]."""
    moved = updates(uploads, center).double()
    return torch.stack([(moved - row).square().sum(1) for row in moved])


def shifted_mean(uploads: Tensor, center: Tensor, shares: Tensor, std: float, seed: int, out: Tensor) -> None:
    """center + Σ_k share_k (x_k − center) + std · noise.

    Args:
        uploads: [K, P].
        center: [P].
        shares: [K], of any sum.
        std: of the noise.
        seed: of the noise.
        out: [P]; written.
    """
    mean = center + (updates(uploads, center) * shares[:, None]).sum(0)
    generator = torch.Generator(uploads.device).manual_seed(seed)
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    out.copy_(mean + std * noise)


def quantize(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """Symmetric int8 per block; a block with NaN or Inf gets a scale of NaN.

    Args:
        x: [P].
        values: int8 [P]; written.
        scales: float32 [P / BLOCK, rounded up]; written.
    """
    tiny = torch.finfo(torch.float32).tiny
    for index, block in enumerate(x.float().split(BLOCK)):
        scale = (block.abs().max() / 127).clamp_min(tiny)
        scales[index] = scale if block.isfinite().all() else torch.nan
        values[index * BLOCK :][: len(block)] = (block / scale).round().nan_to_num(0).to(torch.int8)


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """Float32 [K, P] from int8 values [K, P] and scales [K, P / BLOCK, rounded up]."""
    return values * scales.repeat_interleave(BLOCK, dim=1)[:, : values.shape[1]]


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
