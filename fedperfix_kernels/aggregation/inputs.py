"""Checks that the public functions of aggregation share, and the shares they make of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedperfix_kernels.checks import check_tensor, describe, message

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_rows(argument: str, rows: Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Raise unless `rows` is [K, P] with K > 0, one of `dtypes` and an innermost stride of 1."""
    check_tensor(argument, rows)
    if rows.dim() != 2 or rows.shape[0] == 0:
        raise ValueError(message(argument, describe(rows), "shape [clients, numel] with at least one client"))
    if rows.dtype not in dtypes:
        takes = "a floating dtype" if dtypes is DTYPES else ", ".join(map(str, dtypes))
        raise TypeError(message(argument, str(rows.dtype), takes))
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        remedy = "pass a contiguous tensor or a slice of one"
        raise ValueError(message(argument, f"strides {rows.stride()}", "an innermost stride of 1", remedy))


def check_center(center: Tensor, uploads: Tensor) -> None:
    """Raise unless `center` is contiguous [P] with the uploads' dtype and device."""
    check_tensor("center", center)
    expected = (uploads.shape[1:], uploads.dtype, uploads.device)
    if (center.shape, center.dtype, center.device) != expected or not center.is_contiguous():
        takes = f"a contiguous tensor of shape ({uploads.shape[1]},), {uploads.dtype}, {uploads.device}"
        raise ValueError(message("center", describe(center), takes))


def check_integer(argument: str, got: object, lowest: int, highest: int, remedy: str = "") -> None:
    """Raise unless `got` is an integer between two bounds, both included."""
    if not isinstance(got, int) or isinstance(got, bool):
        raise TypeError(message(argument, f"a {type(got).__name__}", "an int"))
    if not lowest <= got <= highest:
        raise ValueError(message(argument, str(got), f"an integer from {lowest} to {highest}", remedy))


def check_number(argument: str, got: float, *, positive: bool) -> None:
    """Raise unless `got` is finite and positive, or at least 0."""
    if not isinstance(got, (int, float)) or isinstance(got, bool):
        raise TypeError(message(argument, f"a {type(got).__name__}", "a number"))
    if not 0 <= got < float("inf") or (positive and got == 0):
        raise ValueError(message(argument, str(got), f"a finite number {'above' if positive else 'of at least'} 0"))


def checked_out(out: Tensor | None, uploads: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """`out`, or new memory of the first of `dtypes`; raise unless it is contiguous [P] apart from the uploads."""
    shape = uploads.shape[1:]
    if out is None:
        return torch.empty(shape, dtype=dtypes[0], device=uploads.device)
    check_tensor("out", out)
    right = out.shape == shape and out.dtype in dtypes and out.device == uploads.device
    if not right or not out.is_contiguous():
        names = " or ".join(map(str, dtypes))
        takes = f"a contiguous tensor of shape ({uploads.shape[1]},), {names}, {uploads.device}"
        raise ValueError(message("out", describe(out), takes))
    refuse_overlap("out", out, uploads, "a view of the uploads' memory")
    return out


def refuse_overlap(argument: str, written: Tensor, read: Tensor, got: str) -> None:
    """Raise ValueError if the two share memory: operations read while they write. `got` describes it."""
    (start, end), (first, last) = extent(written), extent(read)
    if start < last and first < end:
        raise ValueError(message(argument, got, "memory of its own", "allocate it apart"))


def extent(x: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and the one behind its last; equal if it has no memory."""
    first = x.data_ptr()
    if first == 0 or x.numel() == 0:
        return first, first
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return first, first + (last + 1) * x.element_size()


def native_limit(uploads: Tensor) -> str:
    """Why the native kernels cannot take `uploads`, as a clause; empty if they can."""
    return "uploads are float64 and native kernels compute in float32" if uploads.dtype == torch.float64 else ""


def checked_weights(weights: object, clients: int, layers: int) -> tuple[Tensor, bool]:
    """[K, 1] or [K, layers] float64 on the CPU, and whether it was given per layer."""
    weights = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    per_layer = weights.dim() == 2
    if weights.dim() == 1:
        weights = weights[:, None]
    if weights.dim() != 2 or weights.shape[0] != clients or (per_layer and weights.shape[1] != layers):
        got = (
            f"shape {tuple(weights.shape if per_layer else weights[:, 0].shape)}"
            if weights.dim() == 2
            else "a number"
        )
        raise ValueError(message("weights", got, f"shape [{clients}] or [{clients}, layers] ({layers} here)"))
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError(message("weights", "a negative or non-finite weight", "finite weights of at least 0"))
    if bool((weights.sum(0) <= 0).any()):
        raise ValueError(message("weights", "weights that sum to 0", "a positive sum (in every layer)"))
    return weights, per_layer


def shares_of(weights: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights divided by their sum over clients, in the accumulation dtype of storage `dtype`, on `device`."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return (weights / weights.sum(0, keepdim=True)).to(accumulate).contiguous().to(device)


def refuse_float64_on_gpu(x: Tensor) -> None:
    """Raise TypeError for float64 storage on a GPU, for which there are no kernels."""
    if x.dtype == torch.float64 and x.device.type == "cuda":
        takes = "float16, bfloat16 or float32 with the triton backend"
        raise TypeError(message("uploads", "float64", takes, "use backend='torch'"))
