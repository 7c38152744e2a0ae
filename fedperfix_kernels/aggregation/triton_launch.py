"""Builds the tables that the Triton kernels read and launches them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedperfix_kernels.aggregation import triton_kernels as kernels
from fedperfix_kernels.aggregation.configs import BLOCK, NUM_WARPS, UNROLL


def aggregate_rows(uploads: Tensor, shares: Tensor, block_layer: Tensor | None, out: Tensor) -> None:
    """One launch over the rows of a buffer.

    Args:
        uploads: [K, P], innermost stride 1.
        shares: [K, layers] (layers = 1 without `block_layer`) in the accumulation dtype.
        block_layer: int32 [P / BLOCK], or None for one share per client.
        out: [P]; written.
    """
    clients, numel = uploads.shape
    with torch.cuda.device_of(out):
        kernels.aggregate_rows[triton.cdiv(numel, BLOCK),](
            uploads, shares, shares if block_layer is None else block_layer, out,
            uploads.stride(0), clients, numel, shares.shape[1],
            PER_LAYER=block_layer is not None, **_constants(out),
        )  # fmt: skip


def aggregate_tensors(clients: Sequence[Sequence[Tensor]], shares: Tensor, out: Sequence[Tensor]) -> None:
    """One launch over separate tensors of one dtype.

    Args:
        clients: K sequences of T contiguous tensors.
        shares: [K, T] in the accumulation dtype, on the tensors' device.
        out: T contiguous tensors; written.
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
            *(table.to(device) for table in tables), out[0], len(clients), len(out),
            ALIGNED=aligned, **_constants(out[0]),
        )  # fmt: skip


def _constants(out: Tensor) -> dict[str, object]:
    return {
        "BLOCK": BLOCK,
        "UNROLL": UNROLL,
        "ACC": tl.float64 if out.dtype == torch.float64 else tl.float32,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
    }
