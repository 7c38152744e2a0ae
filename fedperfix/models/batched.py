"""One pass over images of many clients: what they share multiplies all images, what is a client's own only its own.

`torch.func.vmap` maps the model over rows, each with a client's own parameters and images of that client. Products
with shared weights then take the images of all rows as one batch, and products with own weights are batched ones.
PyTorch lacks that for two functions, for which `_RowsTogether` has it: fused attention on a CPU would run once per
row, and a linear layer would lose its bias's precision (and time) under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

PIECE = 32  # images of one client in a row, at most
_ROWS, _IMAGES = 64, 256  # in one pass, at most
_attention = F.scaled_dot_product_attention
_linear = F.linear


@torch.no_grad()
def forward_rows(
    model: nn.Module, own: Mapping[str, Tensor], inputs: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """The outputs of a model that has other parameters in every row.

    Args:
        model: in evaluation mode; it holds what the rows share.
        own: parameters and statistics that differ, by name: [R, *shape].
        inputs: the model's input for b images of every row, [R, b, ...].
        dtype: for autocast; None computes as the parameters are.

    Returns:
        Float32 [R, b, classes].
    """
    device = inputs.device.type

    def row(own: dict[str, Tensor], inputs: Tensor) -> Tensor:
        output = functional_call(model, own, (inputs,))
        if isinstance(output, tuple):  # both heads of a distilled model
            output = torch.stack(output).mean(0)
        return output

    with torch.autocast(device, dtype=dtype, enabled=dtype is not None), _RowsTogether():
        if not own:
            return row({}, inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2]).float()
        return vmap(row)(dict(own), inputs).float()


@torch.no_grad()
def forward_clients(
    model: nn.Module,
    own: Callable[[list[int]], Mapping[str, Tensor]],
    inputs: Tensor,
    clients: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The outputs of the clients' models for images of many clients, in any order.

    Args:
        model, dtype: as in `forward_rows`.
        own: the parameters and statistics of some clients, perhaps with one of them several times: by name,
            [R, *shape].
        inputs: the model's input [B, ...].
        clients: whose model answers for each of them, [B].

    Returns:
        Float32 [B, classes], in the order of `inputs`.
    """
    places: dict[int, list[int]] = {}
    for place, client in enumerate(clients):
        places.setdefault(client, []).append(place)
    length = min(PIECE, max(map(len, places.values())))
    pieces = [(c, own[i : i + length]) for c, own in places.items() for i in range(0, len(own), length)]
    step = max(1, min(_ROWS, _IMAGES // length))
    outputs, order = [], []
    for start in range(0, len(pieces), step):
        rows = pieces[start : start + step]
        chosen = torch.tensor([piece + piece[:1] * (length - len(piece)) for _, piece in rows])
        found = forward_rows(model, own([client for client, _ in rows]), inputs[chosen.to(inputs.device)], dtype)
        outputs += [out[: len(piece)] for out, (_, piece) in zip(found, rows, strict=True)]
        order += [place for _, piece in rows for place in piece]
    return torch.cat(outputs)[torch.tensor(order).argsort().to(inputs.device)]


class _RowsTogether(TorchFunctionMode):
    """Attention and linear layers by the operators below, which know rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _linear:
            return _rows_linear(*_autocast(*_arguments(args, kwargs, ("input", "weight", "bias"))))
        if (
            func is _attention
            and len(args) <= 4
            and not any(kwargs.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
        ):
            q, k, v, mask = _arguments(args[:4], kwargs, ("query", "key", "value", "attn_mask"))
            return _rows_attention(*_autocast(q, k, v), mask, kwargs.get("scale"))
        return func(*args, **kwargs)


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in enumerate(names)]


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast does to the arguments of PyTorch's own operators."""
    device = next(x for x in tensors if x is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None else x.to(dtype) for x in tensors]


def _one_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b: [..., C_out] from x [..., C_in]."""
    return _linear(x, weight, bias)


_rows_linear = torch.library.custom_op("fedperfix::rows_linear", _one_linear, mutates_args=())


@_rows_linear.register_vmap
def _(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    x, weight = _first(x, dims[0]), _first(weight, dims[1])
    bias = None if bias is None else _first(bias, dims[2])
    if dims[0] is None:
        x = x.expand(info.batch_size, *x.shape)
    if dims[1] is None and (bias is None or dims[2] is None):
        return _rows_linear(x, weight, bias), 0
    weight = weight.expand(info.batch_size, *weight.shape[-2:])
    flat = x.flatten(1, -2)  # [R, n, C_in]
    if bias is None:
        out = torch.bmm(flat, weight.mT)
    else:
        out = torch.baddbmm(bias.expand(info.batch_size, -1)[:, None], flat, weight.mT)
    return out.unflatten(1, x.shape[1:-1]) if x.dim() != 3 else out, 0


def _one_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """softmax(scale · q kᵀ + mask) v: [B, H, N, D]."""
    return _attention(q, k, v, attn_mask=mask, scale=scale).contiguous()


_rows_attention = torch.library.custom_op("fedperfix::rows_attention", _one_attention, mutates_args=())


@_rows_attention.register_vmap
def _(
    info: Any, dims: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, int]:
    q, k, v = (_one_batch(x, dim, info.batch_size) for x, dim in zip((q, k, v), dims, strict=False))
    if mask is not None and (dims[3] is not None or (mask.dim() == 4 and mask.shape[0] > 1)):
        mask = _one_batch(mask, dims[3], info.batch_size, q.shape[0] // info.batch_size)
    return _rows_attention(q, k, v, mask, scale).unflatten(0, (info.batch_size, -1)), 0


def _first(x: Tensor, dim: int | None) -> Tensor:
    return x if dim is None else x.movedim(dim, 0)


def _one_batch(x: Tensor, dim: int | None, rows: int, images: int | None = None) -> Tensor:
    """[R·b, ...] from [b, ...] per row; b is `images` where x has one entry for all images of a row."""
    x = x.expand(rows, *x.shape) if dim is None else x.movedim(dim, 0)
    if images is not None:
        x = x.expand(rows, images, *x.shape[2:])
    return x.flatten(0, 1)
