"""The weighted mean as matrix-vector products: the fast path where Triton kernels do not run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Half-precision storage is raised to float32 in pieces of this many elements per client, so that no temporary of
# the uploads' size is made.
_CHUNK = 1 << 16


def aggregate_rows(uploads: Tensor, shares: Tensor, bounds: Sequence[tuple[int, int]], out: Tensor) -> None:
    """out[p] = Σ_k share[k, layer(p)] · uploads[k, p].

    Args:
        uploads: [K, P].
        shares: [K, layers], each column summing to 1, in the accumulation dtype on the uploads' device.
        bounds: first and last element (exclusive) of each layer.
        out: [P]; written.
    """
    for layer, (start, end) in enumerate(bounds):
        share = shares[:, layer]
        if uploads.dtype == share.dtype:
            torch.mv(uploads[:, start:end].T, share, out=out[start:end])
            continue
        for first in range(start, end, _CHUNK):
            last = min(first + _CHUNK, end)
            out[first:last] = torch.mv(uploads[:, first:last].to(share.dtype).T, share)


def weighted_mean(tensors: Sequence[Tensor], shares: Tensor, out: Tensor) -> None:
    """out = Σ_k share_k x_k over K tensors of one shape.

    Args:
        tensors: K tensors of one shape, one per client.
        shares: [K], summing to 1, in the accumulation dtype.
        out: the tensors' shape and dtype; written.
    """
    accumulator = (
        out if out.dtype == shares.dtype else torch.empty(out.shape, dtype=shares.dtype, device=out.device)
    )
    accumulator.zero_()
    for tensor, share in zip(tensors, shares.tolist(), strict=True):
        accumulator.add_(tensor, alpha=share)
    if accumulator is not out:
        out.copy_(accumulator)
