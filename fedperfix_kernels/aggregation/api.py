"""The weighted mean: check, normalise the weights, choose an implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedperfix_kernels.aggregation import composed, native_launch, reference
from fedperfix_kernels.aggregation import op as _registered  # noqa: F401  (defines torch.ops.fedperfix.*)
from fedperfix_kernels.aggregation.inputs import (
    DTYPES,
    check_rows,
    checked_out,
    checked_weights,
    extent,
    native_limit,
    refuse_float64_on_gpu,
    refuse_overlap,
    shares_of,
)
from fedperfix_kernels.aggregation.quantized import RESULTS as QUANTIZED_RESULTS
from fedperfix_kernels.aggregation.quantized import Quantized, check_quantized
from fedperfix_kernels.arena import BlockLayout
from fedperfix_kernels.backends import resolve
from fedperfix_kernels.checks import check_tensor, describe, message

StateDict = Mapping[str, Tensor]


@torch.no_grad()
def aggregate(
    uploads: Tensor | Quantized | Sequence[StateDict],
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]],
    *,
    layout: BlockLayout | None = None,
    out: Tensor | StateDict | None = None,
    nonfinite: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Weighted mean of K clients' parameters, per layer, in one launch (McMahan et al., AISTATS 2017).

    out = Σ_k w_k x_k / Σ_k w_k, accumulated in float32 whatever the storage type (float64 for float64). Nothing of
    the uploads' size is allocated, and the same input gives the same bits. It is not differentiable.

    Args:
        uploads: [K, P], innermost stride 1 (rows may be longer than P); or `Quantized.stack` of K uploads; or K
            state dicts with the same names, shapes and dtypes.
        weights: [K], or [K, layers] for one weight per client and layer: the layers are `layout`'s tensors, or the
            state dicts' entries in the first one's order. Non-negative and finite, each layer's sum above 0.
            They are read on the host: a tensor on a GPU is copied, which waits for it.
        layout: where the layers lie in P (`ParameterArena.shared_layout`); needed for [K, layers].
        out: [P], or a state dict of contiguous tensors, to write into; it may not overlap the uploads.
            Quantized uploads give float32, or the dtype of `out` (float32, float16 or bfloat16).
        nonfinite: bool [K], overwritten: whether each upload holds NaN or Inf, found in the same pass. The mean is
            then not finite; a mean of finite uploads that overflows float32 names no client.
        backend: `auto`, `triton`, `native`, `torch` or `reference`; None is `auto`.

    Returns:
        `out`, or a new tensor [P], or a new dict of tensors.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    if isinstance(uploads, Quantized):
        check_quantized(uploads)
        return _aggregate_rows(uploads.values, uploads.scales, weights, layout, out, nonfinite, backend)
    if isinstance(uploads, Tensor):
        check_rows("uploads", uploads)
        return _aggregate_rows(uploads, None, weights, layout, out, nonfinite, backend)
    if isinstance(uploads, Sequence) and uploads and all(isinstance(x, Mapping) for x in uploads):
        return _aggregate_state_dicts(uploads, weights, out, nonfinite, backend)
    got = f"a {type(uploads).__name__}"
    raise TypeError(
        message("uploads", got, "a tensor [K, P], quantised uploads or a non-empty sequence of state dicts")
    )


def _aggregate_rows(
    uploads: Tensor,
    scales: Tensor | None,
    weights: object,
    layout: BlockLayout | None,
    out: Tensor | None,
    nonfinite: Tensor | None,
    backend: str | None,
) -> Tensor:
    numel = uploads.shape[1]
    if layout is not None and layout.numel != numel:
        raise ValueError(message("layout", f"{layout.numel} elements", f"{numel}, as the uploads"))
    backend = resolve(backend, uploads.device, native_limit(uploads))
    weights, per_layer = checked_weights(weights, uploads.shape[0], layout.layers if layout is not None else 1)
    if per_layer and layout is None:
        remedy = "pass layout=arena.shared_layout"
        raise ValueError(message("weights", f"shape {tuple(weights.shape)}", "shape [K] without a layout", remedy))
    out = checked_out(out, uploads, (uploads.dtype,) if scales is None else QUANTIZED_RESULTS)
    if scales is not None:
        refuse_overlap("out", out, scales, "a view of the uploads' scales")
    _clear(nonfinite, uploads.shape[0], uploads.device)
    if numel == 0:
        return out
    if backend == "reference":
        rows = uploads if scales is None else reference.dequantize(uploads, scales)
        reference.aggregate_rows(rows, weights, _bounds(layout if per_layer else None, numel), out, nonfinite)
        return out
    shares = shares_of(weights, uploads.dtype, uploads.device)
    block_layer = layout.block_layer(uploads.device) if per_layer else None
    if backend == "torch":
        composed.aggregate_rows(uploads, shares, block_layer, scales, out, nonfinite)
    elif backend == "native":
        native_launch.aggregate_rows(uploads, shares, block_layer, scales, out, nonfinite)
    else:
        refuse_float64_on_gpu(uploads)
        torch.ops.fedperfix.aggregate_rows(uploads, shares, block_layer, scales, out, nonfinite)
    return out


def _aggregate_state_dicts(
    uploads: Sequence[StateDict],
    weights: object,
    out: StateDict | None,
    nonfinite: Tensor | None,
    backend: str | None,
) -> dict[str, Tensor]:
    names = _checked_names(uploads)
    first = uploads[0]
    device = first[names[0]].device
    backends = {x.dtype: resolve(backend, device, native_limit(x)) for x in first.values()}
    weights, per_layer = checked_weights(weights, len(uploads), len(names))
    if not per_layer:
        weights = weights.expand(-1, len(names))
    out = _checked_out_dict(out, uploads)
    _clear(nonfinite, len(uploads), device)
    for dtype, backend in backends.items():
        columns = [i for i, name in enumerate(names) if first[name].dtype == dtype and first[name].numel()]
        if not columns:
            continue
        group = [names[i] for i in columns]
        if backend == "native":
            clients = [[client[name] for name in group] for client in uploads]
            shares = shares_of(weights[:, columns], dtype, device)
            native_launch.aggregate_tensors(clients, shares, [out[name] for name in group], nonfinite)
            continue
        if backend == "triton":
            refuse_float64_on_gpu(first[group[0]])
            tensors = [client[name].contiguous() for client in uploads for name in group]
            shares = shares_of(weights[:, columns], dtype, device)
            torch.ops.fedperfix.aggregate_tensors(tensors, shares, [out[name] for name in group], nonfinite)
            continue
        for i, name in zip(columns, group, strict=True):
            tensors = [client[name] for client in uploads]
            if backend == "reference":
                reference.weighted_mean(tensors, weights[:, i].tolist(), out[name], nonfinite)
            else:
                shares = shares_of(weights[:, i], dtype, torch.device("cpu"))
                composed.weighted_mean(tensors, shares, out[name], nonfinite)
    return out


def _bounds(layout: BlockLayout | None, numel: int) -> list[tuple[int, int]]:
    if layout is None:
        return [(0, numel)]
    return list(zip(layout.offsets, (*layout.offsets[1:], numel), strict=True))


def _clear(nonfinite: Tensor | None, clients: int, device: torch.device) -> None:
    if nonfinite is None:
        return
    check_tensor("nonfinite", nonfinite)
    expected = ((clients,), torch.bool, device)
    if (nonfinite.shape, nonfinite.dtype, nonfinite.device) != expected or not nonfinite.is_contiguous():
        takes = f"a contiguous tensor of shape ({clients},), torch.bool, {device}"
        raise ValueError(message("nonfinite", describe(nonfinite), takes))
    nonfinite.fill_(False)


def _checked_out_dict(out: StateDict | None, uploads: Sequence[StateDict]) -> dict[str, Tensor]:
    first = uploads[0]
    if out is None:
        return {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in first.items()}
    if not isinstance(out, Mapping) or list(out) != list(first):
        raise ValueError(message("out", f"a {type(out).__name__}", "a state dict with the uploads' names in order"))
    for name, x in first.items():
        argument = f"out[{name!r}]"
        check_tensor(argument, out[name])
        if (out[name].shape, out[name].dtype, out[name].device) != (x.shape, x.dtype, x.device):
            raise ValueError(message(argument, describe(out[name]), describe(x)))
        if not out[name].is_contiguous():
            raise ValueError(message(argument, f"strides {out[name].stride()}", "contiguous memory"))
    _refuse_overlaps(out, uploads)
    return dict(out)


def _refuse_overlaps(out: StateDict, uploads: Sequence[StateDict]) -> None:
    """Raise if a result shares memory with an upload, of whichever client and name, or with another result."""
    read = [(*extent(x), "") for client in uploads for x in client.values()]
    written = [(*extent(x), f"out[{name!r}]") for name, x in out.items()]
    end = end_written = 0
    latest = ""
    for first, last, argument in sorted(x for x in read + written if x[0] < x[1]):
        if first < (end if argument else end_written):
            got = "memory of an upload or of another result"
            raise ValueError(message(argument or latest, got, "memory of its own", "allocate it apart"))
        end = max(end, last)
        if argument:
            end_written, latest = last, argument


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
            if x.dtype not in DTYPES:
                remedy = "leave counters and indices out"
                raise TypeError(message(argument, str(x.dtype), "a floating dtype", remedy))
            if (x.shape, x.dtype, x.device) != (like.shape, like.dtype, device):
                raise ValueError(message(argument, describe(x), f"{describe(like)}, as in uploads[0]"))
    return names
