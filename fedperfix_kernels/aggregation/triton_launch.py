"""Builds the tables that the Triton kernels read and launches them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedperfix_kernels.aggregation import triton_kernels as kernels
from fedperfix_kernels.aggregation.configs import BLOCK, GRAMS, NETWORKS, NUM_WARPS, SORTS, SPAN, UNROLL, smallest
from fedperfix_kernels.aggregation.network import comparators


def aggregate_rows(
    uploads: Tensor,
    shares: Tensor,
    block_layer: Tensor | None,
    scales: Tensor | None,
    out: Tensor,
    nonfinite: Tensor | None,
) -> None:
    """One launch over the rows of a buffer.

    Args:
        uploads: [K, P], innermost stride 1; int8 with `scales`.
        shares: [K, layers] (layers = 1 without `block_layer`) in the accumulation dtype.
        block_layer: int32 [P / BLOCK], or None for one share per client.
        scales: float32 [K, P / BLOCK] of quantised uploads, or None.
        out: [P]; written.
        nonfinite: bool [K] of False; a client with a non-finite value becomes True. Or None.
    """
    clients, numel = uploads.shape
    with torch.cuda.device_of(out):
        kernels.aggregate_rows[triton.cdiv(numel, BLOCK),](
            uploads, _or(scales, shares), shares, _or(block_layer, shares), out, _or(nonfinite, out),
            uploads.stride(0), clients, numel, triton.cdiv(numel, BLOCK), shares.shape[1],
            PER_LAYER=block_layer is not None, SCALED=scales is not None, NONFINITE=nonfinite is not None,
            **_constants(out),
        )  # fmt: skip


def aggregate_tensors(
    clients: Sequence[Sequence[Tensor]], shares: Tensor, out: Sequence[Tensor], nonfinite: Tensor | None
) -> None:
    """One launch over separate tensors of one dtype.

    Args:
        clients: K sequences of T contiguous tensors.
        shares: [K, T] in the accumulation dtype, on the tensors' device.
        out: T contiguous tensors; written.
        nonfinite: as in `aggregate_rows`.
    """
    device = out[0].device
    blocks = [triton.cdiv(x.numel(), BLOCK) for x in out]
    repeats = torch.tensor(blocks)
    block_tensor = torch.repeat_interleave(torch.arange(len(out), dtype=torch.int32), repeats)
    firsts = torch.cumsum(repeats, 0) - repeats
    block_start = (torch.arange(len(block_tensor)) - torch.repeat_interleave(firsts, repeats)) * BLOCK
    addresses = [[x.data_ptr() for x in tensors] for tensors in clients]
    out_addresses = [x.data_ptr() for x in out]
    aligned = all(address % 16 == 0 for row in [*addresses, out_addresses] for address in row)
    tables = (
        torch.tensor(addresses, dtype=torch.int64),
        shares,
        block_tensor,
        block_start,
        torch.tensor([x.numel() for x in out], dtype=torch.int64),
        torch.tensor(out_addresses, dtype=torch.int64),
    )
    with torch.cuda.device_of(out[0]):
        kernels.aggregate_tables[len(block_tensor),](
            *(table.to(device) for table in tables), out[0], _or(nonfinite, out[0]),
            len(clients), len(out), ALIGNED=aligned, NONFINITE=nonfinite is not None, **_constants(out[0]),
        )  # fmt: skip


def trimmed_mean(uploads: Tensor, trim: int, out: Tensor) -> None:
    """One launch. uploads: [K, P], K at most MAX_CLIENTS; trim: values left out at each end; out: [P]; written."""
    clients, numel = uploads.shape
    arguments = (uploads, out, uploads.stride(0), clients, numel, trim)
    with torch.cuda.device_of(out):
        if clients <= NETWORKS[-1].clients:
            tile = smallest(NETWORKS, clients)
            kernels.trimmed_mean_network[triton.cdiv(numel, tile.block),](
                *arguments, PAIRS=comparators(tile.clients), CLIENTS=tile.clients, BLOCK=tile.block,
                num_warps=tile.num_warps, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            tile = smallest(SORTS, clients)
            kernels.trimmed_mean_sort[triton.cdiv(numel, tile.block),](
                *arguments, CLIENTS=tile.clients, BLOCK=tile.block, num_warps=tile.num_warps, enable_fp_fusion=True,
            )  # fmt: skip


def squared_norms(uploads: Tensor, center: Tensor) -> Tensor:
    """Float64 [K]: ‖x_k − center‖². uploads: [K, P]; center: [P]."""
    clients, numel = uploads.shape
    spans = triton.cdiv(numel, SPAN)
    partial = torch.empty(spans, clients, dtype=torch.float32, device=uploads.device)
    with torch.cuda.device_of(uploads):
        kernels.squared_norms[clients, spans](
            uploads, center, partial, uploads.stride(0), clients, numel,
            BLOCK=BLOCK, SPAN=SPAN, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return partial.sum(0, dtype=torch.float64)


def gram(uploads: Tensor, center: Tensor) -> Tensor:
    """Float64 [K, K]: (x_j − center) · (x_k − center). uploads: [K, P], K at most MAX_CLIENTS; center: [P]."""
    clients, numel = uploads.shape
    spans, tile = triton.cdiv(numel, SPAN), smallest(GRAMS, clients)
    partial = torch.empty(spans, clients, clients, dtype=torch.float32, device=uploads.device)
    with torch.cuda.device_of(uploads):
        kernels.gram[spans,](
            uploads, center, partial, uploads.stride(0), clients, numel,
            CLIENTS=tile.clients, BLOCK=tile.block, SPAN=SPAN, num_warps=tile.num_warps, num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip
    return partial.sum(0, dtype=torch.float64)


def shifted_mean(uploads: Tensor, center: Tensor, shares: Tensor, std: float, seed: int, out: Tensor) -> None:
    """One launch: center + Σ_k share_k (x_k − center) + std · noise.

    Args:
        uploads: [K, P], innermost stride 1.
        center: [P].
        shares: float32 [K], of any sum.
        std: of the noise; 0 for none.
        seed: of the noise, below 2^63.
        out: [P]; written.
    """
    clients, numel = uploads.shape
    with torch.cuda.device_of(out):
        kernels.shifted_mean[triton.cdiv(numel, BLOCK),](
            uploads, center, shares, out, uploads.stride(0), clients, numel, std, seed,
            NOISE=std > 0, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def quantize(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """One launch. x: [P] contiguous; values: int8 [P]; scales: float32 [P / BLOCK, rounded up]; both written."""
    with torch.cuda.device_of(x):
        kernels.quantize[len(scales),](
            x, values, scales, len(x), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True
        )  # fmt: skip


def _or(tensor: Tensor | None, unread: Tensor) -> Tensor:
    """A kernel takes a tensor where it reads none."""
    return unread if tensor is None else tensor


def _constants(out: Tensor) -> dict[str, object]:
    return {
        "BLOCK": BLOCK,
        "UNROLL": UNROLL,
        "ACC": tl.float64 if out.dtype == torch.float64 else tl.float32,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
    }
