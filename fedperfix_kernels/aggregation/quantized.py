"""Uploads as int8 with one scale per block: a quarter of float32's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedperfix_kernels.aggregation import composed, native_launch, reference
from fedperfix_kernels.aggregation import op as _registered  # noqa: F401  (defines torch.ops.fedperfix.*)
from fedperfix_kernels.aggregation.inputs import DTYPES, check_rows
from fedperfix_kernels.arena import BLOCK
from fedperfix_kernels.backends import resolve
from fedperfix_kernels.checks import check_tensor, describe, message

# What the mean of quantised uploads may be stored as; the first unless `out` says otherwise.
RESULTS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Quantized:
    """One upload, or K stacked ones, as int8: x[p] ≈ values[p] · scales[p // BLOCK].

    Args:
        values: int8 [P], or [K, P].
        scales: float32 [blocks], or [K, blocks], contiguous; blocks = P / BLOCK, rounded up.
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def stack(cls, uploads: Sequence[Quantized]) -> Quantized:
        """K uploads of one size as one, in order; takes one copy of them."""
        return cls(torch.stack([x.values for x in uploads]), torch.stack([x.scales for x in uploads]))


@torch.no_grad()
def quantize(x: Tensor, *, backend: str | None = None) -> Quantized:
    """Symmetric int8 with scale = max|block| / 127 per block of `arena.BLOCK` elements, rounded to nearest.

    Each element is off by at most half its block's scale, and so a mean of quantised uploads by at most
    Σ_k share_k · scale_k / 2, beside the rounding of float32. A non-finite element is refused; looking for one
    waits for the device.

    Args:
        x: [P], contiguous.
        backend: `auto`, `triton`, `native`, `torch` or `reference`; None is `auto`.

    Returns:
        values int8 [P] and scales float32 [P / BLOCK, rounded up].

    Raises:
        ValueError, TypeError: `x` of the wrong shape or dtype, or not finite.
    """
    check_tensor("x", x)
    if x.dim() != 1 or not x.is_contiguous():
        raise ValueError(message("x", f"{describe(x)}, strides {x.stride()}", "a contiguous tensor [P]"))
    if x.dtype not in DTYPES[:3]:
        raise TypeError(message("x", str(x.dtype), "float16, bfloat16 or float32"))
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(-(-len(x) // BLOCK), dtype=torch.float32, device=x.device)
    backend = resolve(backend, x.device)
    if len(x):
        operation = {
            "reference": reference.quantize,
            "torch": composed.quantize,
            "native": native_launch.quantize,
            "triton": torch.ops.fedperfix.quantize,
        }
        operation[backend](x, values, scales)
    bad = scales.isnan().nonzero()
    if len(bad):
        got = f"NaN or Inf in elements {int(bad[0]) * BLOCK} to {min(len(x), (int(bad[0]) + 1) * BLOCK) - 1}"
        raise ValueError(message("x", got, "finite elements", "leave this upload out"))
    return Quantized(values, scales)


def check_quantized(uploads: Quantized) -> None:
    """Raise unless these are K stacked uploads."""
    check_rows("uploads.values", uploads.values, (torch.int8,))
    check_tensor("uploads.scales", uploads.scales)
    clients, numel = uploads.values.shape
    shape, found = (clients, -(-numel // BLOCK)), uploads.scales
    expected = (shape, torch.float32, uploads.values.device)
    if (found.shape, found.dtype, found.device) != expected or not found.is_contiguous():
        takes = f"a contiguous tensor of shape {shape}, torch.float32, {uploads.values.device}"
        raise ValueError(message("uploads.scales", describe(found), takes))
