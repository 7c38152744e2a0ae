"""The public function of aggregation: check, normalise the weights, choose an implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedperfix_kernels.aggregation import composed, reference
from fedperfix_kernels.aggregation import op as _registered  # noqa: F401  (defines torch.ops.fedperfix.*)
from fedperfix_kernels.arena import BlockLayout
from fedperfix_kernels.backends import resolve
from fedperfix_kernels.checks import check_tensor, describe, message

StateDict = Mapping[str, Tensor]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def aggregate(
    uploads: Tensor | Sequence[StateDict],
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]],
    *,
    layout: BlockLayout | None = None,
    out: Tensor | StateDict | None = None,
    backend: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Weighted mean of K clients' parameters, per layer, in one launch (McMahan et al., AISTATS 2017).

    out = Σ_k w_k x_k / Σ_k w_k, accumulated in float32 whatever the storage type (float64 for float64). Nothing of
    the uploads' size is allocated, and the same input gives the same bits. It is not differentiable.

    Args:
        uploads: [K, P], innermost stride 1 (rows may be longer than P), or K state dicts with the same names,
            shapes and dtypes.
        weights: [K], or [K, layers] for one weight per client and layer: the layers are `layout`'s tensors, or the
            state dicts' entries in the first one's order. Non-negative and finite, each layer's sum above 0.
            They are read on the host: a tensor on a GPU is copied, which waits for it.
        layout: where the layers lie in P (`ParameterArena.shared_layout`); needed for [K, layers].
        out: [P], or a state dict of contiguous tensors, to write into; it may not overlap the uploads.
        backend: `auto`, `triton`, `torch` or `reference`; None is `auto`.

    Returns:
        `out`, or a new tensor [P], or a new dict of tensors.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    if isinstance(uploads, Tensor):
        return _aggregate_rows(uploads, weights, layout, out, backend)
    if isinstance(uploads, Sequence) and uploads and all(isinstance(x, Mapping) for x in uploads):
        return _aggregate_state_dicts(uploads, weights, out, backend)
    got = f"a {type(uploads).__name__}"
    raise TypeError(message("uploads", got, "a tensor [K, P] or a non-empty sequence of state dicts"))


def _aggregate_rows(uploads, weights, layout, out, backend) -> Tensor:
    if uploads.dim() != 2 or uploads.shape[0] == 0:
        raise ValueError(message("uploads", describe(uploads), "shape [clients, numel] with at least one client"))
    if uploads.dtype not in _DTYPES:
        raise TypeError(message("uploads", str(uploads.dtype), "a floating dtype"))
    if uploads.shape[1] > 1 and uploads.stride(1) != 1:
        remedy = "pass a contiguous tensor or a slice of one"
        raise ValueError(message("uploads", f"strides {uploads.stride()}", "an innermost stride of 1", remedy))
    if layout is not None and layout.numel != uploads.shape[1]:
        raise ValueError(message("layout", f"{layout.numel} elements", f"{uploads.shape[1]}, as the uploads"))
    backend = resolve(backend, uploads.device)
    layers = layout.layers if layout is not None else 1
    weights, per_layer = _checked_weights(weights, uploads.shape[0], layers)
    if per_layer and layout is None:
        remedy = "pass layout=arena.shared_layout"
        raise ValueError(message("weights", f"shape {tuple(weights.shape)}", "shape [K] without a layout", remedy))
    out = _checked_out(out, uploads)
    if uploads.shape[1] == 0:
        return out
    bounds = _bounds(layout, uploads.shape[1]) if per_layer else [(0, uploads.shape[1])]
    if backend == "reference":
        reference.aggregate_rows(uploads, weights, bounds, out)
        return out
    shares = _shares(weights, uploads)
    if backend == "torch":
        composed.aggregate_rows(uploads, shares, bounds, out)
    else:
        _refuse_float64_on_gpu(uploads)
        block_layer = layout.block_layer(uploads.device) if per_layer else None
        torch.ops.fedperfix.aggregate_rows(uploads, shares, block_layer, out)
    return out


def _aggregate_state_dicts(uploads, weights, out, backend) -> dict[str, Tensor]:
    names = _checked_names(uploads)
    first = uploads[0]
    backend = resolve(backend, next(iter(first.values())).device)
    weights, per_layer = _checked_weights(weights, len(uploads), len(names))
    if not per_layer:
        weights = weights.expand(-1, len(names))
    out = _checked_out_dict(out, first)
    for dtype in dict.fromkeys(x.dtype for x in first.values()):
        columns = [i for i, name in enumerate(names) if first[name].dtype == dtype and first[name].numel()]
        if not columns:
            continue
        group = [names[i] for i in columns]
        if backend == "triton":
            _refuse_float64_on_gpu(first[group[0]])
            tensors = [client[name].contiguous() for client in uploads for name in group]
            shares = _shares(weights[:, columns], tensors[0])
            torch.ops.fedperfix.aggregate_tensors(tensors, shares, [out[name] for name in group])
            continue
        for i, name in zip(columns, group, strict=True):
            tensors = [client[name] for client in uploads]
            if backend == "reference":
                reference.weighted_mean(tensors, weights[:, i].tolist(), out[name])
            else:
                composed.weighted_mean(tensors, _shares(weights[:, i], tensors[0]).cpu(), out[name])
    return out


def _checked_weights(weights, clients: int, layers: int) -> tuple[Tensor, bool]:
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


def _shares(weights: Tensor, like: Tensor) -> Tensor:
    """The weights divided by their sum over clients, in the accumulation dtype on `like`'s device."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (weights / weights.sum(0, keepdim=True)).to(dtype).contiguous().to(like.device)


def _bounds(layout: BlockLayout, numel: int) -> list[tuple[int, int]]:
    return list(zip(layout.offsets, (*layout.offsets[1:], numel), strict=True))


def _checked_out(out, uploads: Tensor) -> Tensor:
    if out is None:
        return torch.empty(uploads.shape[1], dtype=uploads.dtype, device=uploads.device)
    check_tensor("out", out)
    expected = (uploads.shape[1:], uploads.dtype, uploads.device)
    if (out.shape, out.dtype, out.device) != expected or not out.is_contiguous():
        takes = f"a contiguous tensor of shape ({uploads.shape[1]},), {uploads.dtype}, {uploads.device}"
        raise ValueError(message("out", describe(out), takes))
    if out.untyped_storage().data_ptr() == uploads.untyped_storage().data_ptr():
        raise ValueError(message("out", "a view of the uploads' memory", "memory of its own", "allocate it apart"))
    return out


def _checked_out_dict(out, first: StateDict) -> dict[str, Tensor]:
    if out is None:
        return {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in first.items()}
    if not isinstance(out, Mapping) or list(out) != list(first):
        raise ValueError(message("out", f"a {type(out).__name__}", "a state dict with the uploads' names in order"))
    for name, x in first.items():
        if (out[name].shape, out[name].dtype, out[name].device) != (x.shape, x.dtype, x.device):
            raise ValueError(message(f"out[{name!r}]", describe(out[name]), describe(x)))
        if not out[name].is_contiguous() or out[name].data_ptr() == x.data_ptr() != 0:
            raise ValueError(
                message(f"out[{name!r}]", "strided or the upload itself", "contiguous memory of its own")
            )
    return dict(out)


def _checked_names(uploads: Sequence[StateDict]) -> list[str]:
    names = list(uploads[0])
    if not names:
        raise ValueError(message("uploads[0]", "an empty state dict", "at least one tensor"))
    device = uploads[0][names[0]].device
    for k, client in enumerate(uploads):
        if list(client) != names:
            different = sorted(set(client) ^ set(names)) or ["their order"]
            takes = "the same names in every client"
            raise ValueError(message(f"uploads[{k}]", "other names: " + ", ".join(different[:5]), takes))
        for name, x in client.items():
            argument, like = f"uploads[{k}][{name!r}]", uploads[0][name]
            check_tensor(argument, x)
            if x.dtype not in _DTYPES:
                remedy = "leave counters and indices out"
                raise TypeError(message(argument, str(x.dtype), "a floating dtype", remedy))
            if (x.shape, x.dtype, x.device) != (like.shape, like.dtype, device):
                raise ValueError(message(argument, describe(x), f"{describe(like)}, as in uploads[0]"))
    return names


def _refuse_float64_on_gpu(x: Tensor) -> None:
    if x.dtype == torch.float64 and x.device.type == "cuda":
        takes = "float16, bfloat16 or float32 with the triton backend"
        raise TypeError(message("uploads", "float64", takes, "use backend='torch'"))
