"""The weighted mean as a loop over layers and clients: the reference for tests and the eager baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """out = Σ_k w_k x_k / Σ_k w_k, accumulated in float32 (float64 for float64 storage).

    Args:
        tensors: K tensors of one shape, one per client.
        weights: K numbers.
        out: the tensors' shape and dtype; written.
    """
    accumulate = torch.float64 if out.dtype == torch.float64 else torch.float32
    total = torch.zeros(out.shape, dtype=accumulate, device=out.device)
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + tensor.to(accumulate) * weight
    out.copy_(total / sum(weights))


def aggregate_rows(uploads: Tensor, weights: Tensor, bounds: Sequence[tuple[int, int]], out: Tensor) -> None:
    """`weighted_mean` of the rows of `uploads` [K, P], layer by layer.

    Args:
        uploads: [K, P].
        weights: [K, layers] on the CPU, not normalised.
        bounds: first and last element (exclusive) of each layer.
        out: [P]; written.
    """
    for layer, (start, end) in enumerate(bounds):
        weighted_mean([row[start:end] for row in uploads], weights[:, layer].tolist(), out[start:end])
