"""Aggregation from PyTorch's own operations: the fast path where Triton kernels do not run.

Storage is raised to the accumulation dtype in tiles that stay in cache: no temporary of the uploads' size is made.
Where one call of PyTorch covers everything without raising it, that call is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedperfix_kernels.aggregation.network import comparators, leading_to
from fedperfix_kernels.aggregation.tiles import columns_of
from fedperfix_kernels.arena import BLOCK

_BAGS = 2048  # blocks per call of embedding_bag: few calls, and 4 MiB of results


def aggregate_rows(
    uploads: Tensor,
    shares: Tensor,
    block_layer: Tensor | None,
    scales: Tensor | None,
    out: Tensor,
    nonfinite: Tensor | None,
) -> None:
    """out[p] = Σ_k share[k, layer(p)] · x[k, p]; x is the uploads, times scale[k, block(p)] if there are scales.

    Args:
        uploads: [K, P]; int8 with `scales`.
        shares: [K, layers] (layers = 1 without `block_layer`), each column summing to 1, in the accumulation dtype.
        block_layer: int32 [P / BLOCK], or None for one share per client.
        scales: float32 [K, P / BLOCK, rounded up] of quantised uploads, or None.
        out: [P]; written.
        nonfinite: bool [K] of False; a client with a non-finite value becomes True. Or None.
    """
    if block_layer is None and scales is None and uploads.dtype == shares.dtype:
        torch.mv(uploads.T, shares[:, 0], out=out)
    elif scales is None and _is_table(uploads):
        whole = uploads.shape[1] // BLOCK * BLOCK
        _sum_in_bags(uploads[:, :whole], shares, block_layer, out[:whole])
        _sum_in_tiles(uploads[:, whole:], shares[:, :1].T, out[whole:])
    else:
        per_block = _block_shares(shares, block_layer, -(-uploads.shape[1] // BLOCK))
        _sum_in_tiles(uploads, per_block if scales is None else per_block * scales.T, out)
    if nonfinite is not None and scales is not None:
        nonfinite.logical_or_(~scales.isfinite().all(1))
    elif nonfinite is not None:
        _mark_nonfinite(uploads, out, nonfinite)


def weighted_mean(tensors: Sequence[Tensor], shares: Tensor, out: Tensor, nonfinite: Tensor | None) -> None:
    """out = Σ_k share_k x_k over K tensors of one shape.

    Args:
        tensors: K tensors of one shape, one per client.
        shares: [K], summing to 1, in the accumulation dtype.
        out: the tensors' shape and dtype; written.
        nonfinite: as in `aggregate_rows`.
    """
    accumulator = (
        out if out.dtype == shares.dtype else torch.empty(out.shape, dtype=shares.dtype, device=out.device)
    )
    accumulator.zero_()
    for tensor, share in zip(tensors, shares.tolist(), strict=True):
        accumulator.add_(tensor, alpha=share)
    if accumulator is not out:
        out.copy_(accumulator)
    if nonfinite is not None and not _all_finite(out):
        nonfinite.logical_or_(torch.stack([~tensor.isfinite().all() for tensor in tensors]))


def trimmed_mean(uploads: Tensor, trim: int, out: Tensor) -> None:
    """Mean of each coordinate without its `trim` smallest and largest values, by a sorting network over clients.

    torch.minimum and torch.maximum propagate NaN, and every output of a sorting network depends on every input: a
    NaN reaches all ranks.

    Args:
        uploads: [K, P].
        trim: less than K / 2.
        out: [P]; written.
    """
    clients = uploads.shape[0]
    kept = range(trim, clients - trim)
    pairs = leading_to(comparators(clients), kept)
    for columns, tile in _tiles(uploads):
        rows = list(tile)
        spare = torch.empty_like(rows[0])
        for i, j in pairs:
            torch.minimum(rows[i], rows[j], out=spare)
            torch.maximum(rows[i], rows[j], out=rows[j])
            rows[i], spare = spare, rows[i]
        total = rows[trim]
        for rank in kept[1:]:
            total.add_(rows[rank])
        out[columns] = total.div_(len(kept))


def squared_norms(uploads: Tensor, center: Tensor) -> Tensor:
    """Float64 [K]: ‖x_k − center‖². uploads: [K, P]; center: [P]."""
    total = torch.zeros(uploads.shape[0], dtype=torch.float64, device=uploads.device)
    for _, tile in _tiles(uploads, center):
        total += torch.linalg.vector_norm(tile, dim=1).double().square()
    return total


def gram(uploads: Tensor, center: Tensor) -> Tensor:
    """Float64 [K, K]: (x_j − center) · (x_k − center). uploads: [K, P]; center: [P]."""
    clients = uploads.shape[0]
    total = torch.zeros(clients, clients, dtype=torch.float64, device=uploads.device)
    for _, tile in _tiles(uploads, center):
        total += tile @ tile.T
    return total


def shifted_mean(uploads: Tensor, center: Tensor, shares: Tensor, std: float, seed: int, out: Tensor) -> None:
    """center + Σ_k share_k (x_k − center) + std · noise.

    Args:
        uploads: [K, P].
        center: [P].
        shares: [K], of any sum, in the accumulation dtype.
        std: of the noise; 0 for none.
        seed: of the noise.
        out: [P]; written.
    """
    generator = torch.Generator(uploads.device).manual_seed(seed)
    for columns, tile in _tiles(uploads, center):
        total = torch.mv(tile.T, shares).add_(center[columns])
        if std > 0:
            noise = torch.randn(total.shape, generator=generator, dtype=total.dtype, device=total.device)
            total.add_(noise, alpha=std)
        out[columns] = total


def quantize(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """Symmetric int8 per block; a block with NaN or Inf gets a scale of NaN.

    Args:
        x: [P].
        values: int8 [P]; written.
        scales: float32 [P / BLOCK, rounded up]; written.
    """
    for columns in columns_of(x[None]):
        blocks = slice(columns.start // BLOCK, -(-columns.stop // BLOCK))
        tile = F.pad(x[columns].float(), (0, -(columns.stop - columns.start) % BLOCK)).view(-1, BLOCK)
        largest = tile.abs().amax(1)  # NaN if there is one
        found = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)  # a block may be zero
        rounded = (tile / found[:, None]).round_().nan_to_num_(0)
        values[columns] = rounded.view(-1)[: columns.stop - columns.start].to(torch.int8)
        scales[blocks] = torch.where(largest.isfinite(), found, torch.nan)


def _block_shares(shares: Tensor, block_layer: Tensor | None, blocks: int) -> Tensor:
    """[blocks, K]: each block's shares, from [K, layers]."""
    return shares.T.expand(blocks, -1) if block_layer is None else shares.T[block_layer]


def _sum_in_tiles(uploads: Tensor, shares: Tensor, out: Tensor) -> None:
    """out [P] = Σ_k shares[block(p), k] · uploads[k, p], as a product per block of matrices [1, K] [K, BLOCK]."""
    numel = uploads.shape[1]
    whole = numel // BLOCK * BLOCK
    if uploads.dtype == shares.dtype:
        _block_products(uploads[:, :whole], shares, out[:whole])
    else:
        for columns, tile in _tiles(uploads[:, :whole]):
            total = torch.empty(tile.shape[1], dtype=shares.dtype, device=out.device)
            _block_products(tile, shares[columns.start // BLOCK : columns.stop // BLOCK], total)
            out[columns] = total
    if whole < numel:
        out[whole:] = torch.mv(uploads[:, whole:].to(shares.dtype).T, shares[whole // BLOCK])


def _block_products(tile: Tensor, shares: Tensor, out: Tensor) -> None:
    blocks = shares[: tile.shape[1] // BLOCK, None]  # [blocks, 1, K]
    torch.bmm(blocks, tile.unflatten(1, (-1, BLOCK)).transpose(0, 1), out=out.view(-1, 1, BLOCK))


def _is_table(uploads: Tensor) -> bool:
    """Whether half-precision rows on a CPU can be read as one table of blocks."""
    half = uploads.dtype in (torch.bfloat16, torch.float16)
    return half and uploads.device.type == "cpu" and (len(uploads) == 1 or uploads.stride(0) % BLOCK == 0)


def _sum_in_bags(uploads: Tensor, shares: Tensor, block_layer: Tensor | None, out: Tensor) -> None:
    """out [P] = Σ_k share[k, layer(p)] · uploads[k, p] in float32, without raising the uploads in memory.

    `embedding_bag` sums table rows times weights of the table's own type, in float32. A share is therefore given as
    two such weights. Their sum is off by 2^-18 of the share in bfloat16 and 2^-24 in float16 (or 2^-25, absolute):
    less than a 500th of the rounding of the result.
    """
    clients, numel = uploads.shape
    blocks, row_blocks = numel // BLOCK, uploads.stride(0) // BLOCK if clients > 1 else 0
    table = uploads.as_strided(((clients - 1) * row_blocks + blocks, BLOCK), (BLOCK, 1))
    parts = _parts(shares.T, uploads.dtype)  # [layers, K, 2]
    bags = min(_BAGS, blocks)
    rows = torch.arange(bags, dtype=torch.int32)[:, None] + torch.arange(clients, dtype=torch.int32) * row_blocks
    rows = rows.flatten().repeat_interleave(2)  # a bag per block: every client's row twice
    offsets = torch.arange(bags, dtype=torch.int32) * parts[0].numel()
    weights = parts.expand(bags, -1, -1).flatten() if block_layer is None else None
    for first in range(0, blocks, _BAGS):
        count = min(_BAGS, blocks - first)
        if block_layer is not None:
            weights = parts[block_layer[first : first + count]].flatten()
        used = count * parts[0].numel()
        sums = F.embedding_bag(
            rows[:used], table[first:], offsets[:count], mode="sum", per_sample_weights=weights[:used]
        )
        out[first * BLOCK : (first + count) * BLOCK] = sums.view(-1)


def _parts(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """[…, 2]: two values of `dtype` whose sum is the share, nearly."""
    high = shares.to(dtype)
    return torch.stack([high, (shares - high).to(dtype)], -1)


def _mark_nonfinite(uploads: Tensor, out: Tensor, nonfinite: Tensor) -> None:
    """Name the clients with NaN or Inf: 0 · NaN is NaN, so they need a look only where `out` [P] is not finite."""
    if not _all_finite(out):
        for columns in columns_of(uploads):
            if not _all_finite(out[columns]):
                nonfinite.logical_or_(~uploads[:, columns].isfinite().all(1))


def _all_finite(x: Tensor) -> bool:
    return x.numel() == 0 or all(bool(bound.isfinite()) for bound in torch.aminmax(x))


def _tiles(uploads: Tensor, center: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Columns and the uploads there, minus `center`, as a copy [K, columns] in the accumulation dtype."""
    dtype = torch.float64 if uploads.dtype == torch.float64 else torch.float32
    for columns in columns_of(uploads):
        tile = uploads[:, columns].to(dtype, copy=True)
        yield columns, tile if center is None else tile.sub_(center[columns])
