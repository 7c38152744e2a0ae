"""Fills in what the native kernels read and calls them, on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from fedperfix_kernels.aggregation.network import comparators, leading_to
from fedperfix_kernels.aggregation.tiles import columns_of
from fedperfix_kernels.arena import BLOCK
from fedperfix_kernels.native import library

# Elements of a piece: its sums in float32 take half of a first-level cache.
_PIECE = 4 * BLOCK
# The Gram matrix of every piece is kept: pieces of at least so many elements, and at most so many of them.
_GRAM_PIECE, _GRAM_PIECES = 16 * BLOCK, 256


class _Call(ctypes.Structure):
    """`struct aggregation` of library.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("rows", "out", "numel", "first_piece", "shares", "block_layer", "scales")),
        *((name, c_void_p) for name in ("nonfinite", "center", "noise", "pairs", "partial", "total")),
        *((name, c_void_p) for name in ("values", "value_scales")),
        *((name, c_int64) for name in ("clients", "tensors", "layers", "blocks", "pieces", "piece")),
        *((name, c_int64) for name in ("pair_count", "trim", "results")),
        ("std", c_float),
        ("dtype", c_int32),
        ("out_dtype", c_int32),
    )


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
        uploads: [K, P], innermost stride 1; int8 with `scales`.
        shares: float32 [K, layers] (layers = 1 without `block_layer`).
        block_layer: int32 [P / BLOCK], or None for one share per client.
        scales: float32 [K, P / BLOCK, rounded up] of quantised uploads, or None.
        out: [P]; written. It may not overlap the uploads or the scales.
        nonfinite: bool [K] of False; a client with a non-finite value becomes True. Or None.
    """
    table = _Table([_rows(uploads)], [uploads.shape[1]], [out])
    call = table.call(uploads.dtype, shares=shares, block_layer=block_layer, scales=scales, nonfinite=nonfinite)
    call.blocks = -(-uploads.shape[1] // BLOCK)
    library.call("weighted_mean", call)


def aggregate_tensors(
    clients: Sequence[Sequence[Tensor]], shares: Tensor, out: Sequence[Tensor], nonfinite: Tensor | None
) -> None:
    """The weighted mean of separate tensors of one dtype, in one call.

    Args:
        clients: K sequences of T tensors; a copy is made of those that are not contiguous.
        shares: float32 [K, T].
        out: T contiguous tensors; written. They may not overlap the clients'.
        nonfinite: as in `aggregate_rows`.
    """
    kept = [[tensor.contiguous() for tensor in tensors] for tensors in zip(*clients, strict=True)]
    table = _Table([[_address(x) for x in tensors] for tensors in kept], [x.numel() for x in out], out)
    library.call("weighted_mean", table.call(out[0].dtype, shares=shares, nonfinite=nonfinite))


def trimmed_mean(uploads: Tensor, trim: int, out: Tensor) -> None:
    """Mean of each coordinate without its `trim` smallest and largest values; NaN where any is NaN.

    Args:
        uploads: [K, P], innermost stride 1.
        trim: less than K / 2.
        out: [P]; written. It may not overlap the uploads.
    """
    clients, numel = uploads.shape
    pairs = leading_to(comparators(clients), range(trim, clients - trim))
    table = _Table([_rows(uploads)], [numel], [out])
    call = table.call(uploads.dtype, pairs=torch.tensor(pairs, dtype=torch.int32))
    call.pair_count, call.trim = len(pairs), trim
    library.call("trimmed_mean", call)


def squared_norms(uploads: Tensor, center: Tensor) -> Tensor:
    """Float64 [K]: ‖x_k − center‖². uploads: [K, P], innermost stride 1; center: [P]."""
    return _sums("squared_norms", uploads, center, (len(uploads),), _PIECE)


def gram(uploads: Tensor, center: Tensor) -> Tensor:
    """Float64 [K, K]: (x_j − center) · (x_k − center). uploads: [K, P], innermost stride 1; center: [P]."""
    piece = max(_GRAM_PIECE, -(-uploads.shape[1] // _GRAM_PIECES // BLOCK) * BLOCK)
    return _sums("gram", uploads, center, (len(uploads), len(uploads)), piece)


def shifted_mean(uploads: Tensor, center: Tensor, shares: Tensor, std: float, seed: int, out: Tensor) -> None:
    """center + Σ_k share_k (x_k − center) + std · noise, the noise of the `torch` backend.

    Args:
        uploads: [K, P], innermost stride 1.
        center: [P].
        shares: float32 [K], of any sum.
        std: of the noise; 0 for none.
        seed: of the noise.
        out: [P]; written. It may overlap neither the uploads nor `center`.
    """
    generator = torch.Generator().manual_seed(seed)
    for columns in columns_of(uploads) if std > 0 else (slice(0, len(out)),):
        rows, part = uploads[:, columns], out[columns]
        noise = torch.randn(part.shape, generator=generator) if std > 0 else None
        table = _Table([_rows(rows)], [len(part)], [part])
        call = table.call(uploads.dtype, shares=shares, center=center[columns], noise=noise)
        call.std = std
        library.call("weighted_mean", call)


def quantize(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """Symmetric int8 per block; a block with NaN or Inf gets a scale of NaN.

    Args:
        x: [P] contiguous.
        values: int8 [P]; written.
        scales: float32 [P / BLOCK, rounded up]; written.
    """
    table = _Table([_rows(x[None])], [len(x)], [])
    library.call("quantize", table.call(x.dtype, values=values, value_scales=scales))


def _sums(operation: str, uploads: Tensor, center: Tensor, shape: tuple[int, ...], piece: int) -> Tensor:
    """Sums over P of `operation`, float64 of `shape`: those of the pieces, added in order."""
    table = _Table([_rows(uploads)], [uploads.shape[1]], [], piece)
    total = torch.empty(shape, dtype=torch.float64)
    partial = torch.empty(table.pieces, *shape, dtype=torch.float64)
    call = table.call(uploads.dtype, center=center, partial=partial, total=total)
    call.results = total.numel()
    library.call(operation, call)
    return total


class _Table:
    """Where the clients' tensors and the results lie, and the pieces that they are cut into.

    Args:
        rows: T sequences of K addresses.
        numel: of each tensor.
        out: the T results, or nothing where there are others.
        piece: elements of a piece.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], numel: Sequence[int], out: Sequence[Tensor], piece: int = _PIECE
    ) -> None:
        self._out, self._piece = out, piece
        sizes = torch.tensor(numel, dtype=torch.int64)
        first_piece = torch.cat([sizes.new_zeros(1), ((sizes + piece - 1) // piece).cumsum(0)])
        self.clients, self.pieces = len(rows[0]), int(first_piece[-1])
        addresses = torch.tensor([_address(x) for x in out], dtype=torch.int64)
        self._kept = {"rows": torch.tensor(rows), "out": addresses, "numel": sizes, "first_piece": first_piece}

    def call(self, dtype: torch.dtype, **tensors: Tensor | None) -> _Call:
        """The struct with `tensors` as its fields; it is good for as long as this table."""
        self._kept |= {name: tensor for name, tensor in tensors.items() if tensor is not None}
        call = _Call(
            clients=self.clients, tensors=len(self._kept["numel"]), pieces=self.pieces, piece=self._piece,
            dtype=library.DTYPES[dtype], out_dtype=library.DTYPES[self._out[0].dtype] if self._out else 0,
        )  # fmt: skip
        for name, tensor in self._kept.items():
            setattr(call, name, _address(tensor))
        shares = tensors.get("shares")
        call.layers = shares.shape[1] if shares is not None and shares.dim() == 2 else 1
        return call


def _rows(uploads: Tensor) -> list[int]:
    """Where each row lies."""
    first, step = _address(uploads), uploads.stride(0) * uploads.element_size()
    return [first + k * step for k in range(len(uploads))]


def _address(tensor: Tensor) -> int:
    """Where a tensor's memory starts.

    Raises:
        RuntimeError: its storage was made smaller than the tensor.
    """
    span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    needed = (tensor.storage_offset() + span) * tensor.element_size() if tensor.numel() else 0
    if tensor.untyped_storage().nbytes() < needed:
        raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} has lost its memory: its storage was resized")
    return tensor.data_ptr()
