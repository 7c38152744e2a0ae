"""The public functions of prefix attention: check, cast, choose an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from fedperfix_kernels.attention import composed, reference
from fedperfix_kernels.attention.configs import MAX_HEAD_DIM
from fedperfix_kernels.attention.op import PackedPrefixAttentionFunction, PrefixAttentionFunction
from fedperfix_kernels.backends import resolve
from fedperfix_kernels.checks import check_choice, check_tensor, describe, message

MODES = ("gated", "concat", "additive")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: float | Tensor,
    *,
    mode: str = "gated",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention with a prefix branch beside it, fused where a GPU is there.

    With A(q, k, v) = softmax(q kᵀ · scale) v:

    - `gated`: A(q, k, v) + g · A(q, p_k, p_v) (He et al., ICLR 2022, with a learned gate)
    - `concat`: A(q, [k; g·p_k], [v; g·p_v]) (Sun et al., ICCV 2023, equations 3 and 5)
    - `additive`: A(q, k + g·p_k, v + g·p_v), L = N (Yu et al., arXiv 2210.00788)

    Args:
        q, k, v: [B, N, H, D], any strides; views of a packed projection are read in place.
        prefix_k, prefix_v: [B, L, H, D], or [1, L, H, D] for one prefix shared by the batch.
        gate: g, a number or a tensor of shape [], [1] or [H] (one value per head).
        mode: one of `MODES`.
        scale: factor of the scores; None is 1/√D.
        backend: `auto`, `triton`, `torch` or `reference`; None is `auto`.

    Under autocast the inputs are cast to its dtype, as in scaled_dot_product_attention. The triton backend
    computes float32 products in full precision unless PyTorch's own matrix products are set to TF32.

    Returns:
        [B, N, H, D], contiguous with the triton backend.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    q, k, v, prefix_k, prefix_v = _autocast({"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v})
    backend = _check(q, k, v, prefix_k, prefix_v, mode, backend)
    gate = _gate_per_head(gate, q)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if q.numel() == 0:
        return torch.zeros_like(q)
    if backend == "triton":
        q, k, v, prefix_k, prefix_v = map(_readable, (q, k, v, prefix_k, prefix_v))
        return PrefixAttentionFunction.apply(q, k, v, prefix_k, prefix_v, gate, mode, scale)[0]
    implementation = composed if backend == "torch" else reference
    with torch.autocast(q.device.type, enabled=False):
        return implementation.prefix_attention(q, k, v, prefix_k, prefix_v, gate, mode, scale)


def packed_prefix_attention(
    qkv: Tensor,
    prefix: Tensor,
    gate: float | Tensor,
    *,
    mode: str = "gated",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`prefix_attention` on packed projections, whose gradients are written packed as well.

    Args:
        qkv: [B, N, 3, H, D], any strides.
        prefix: [B, L, 2, H, D] (p_k, p_v), or [1, L, 2, H, D] for one prefix shared by the batch.
        gate, mode, scale, backend: as in `prefix_attention`.

    Returns:
        [B, N, H, D].

    Raises:
        ValueError, TypeError: as `prefix_attention`.
    """
    qkv, prefix = _autocast({"qkv": qkv, "prefix": prefix})
    for name, tensor, parts in (("qkv", qkv, 3), ("prefix", prefix, 2)):
        if tensor.dim() != 5 or tensor.shape[2] != parts:
            raise ValueError(message(name, describe(tensor), f"shape [batch, tokens, {parts}, heads, head_dim]"))
    if resolve(backend, qkv.device) != "triton" or qkv.numel() == 0:
        return prefix_attention(*qkv.unbind(2), *prefix.unbind(2), gate, mode=mode, scale=scale, backend=backend)
    _check(*qkv.unbind(2), *prefix.unbind(2), mode, backend)
    gate = _gate_per_head(gate, qkv)
    scale = float(qkv.shape[-1] ** -0.5 if scale is None else scale)
    return PackedPrefixAttentionFunction.apply(_readable(qkv), _readable(prefix), gate, mode, scale)[0]


def _autocast(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where autocast is on for the tensors' device."""
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    device_type = next(iter(tensors.values())).device.type
    if not torch.is_autocast_enabled(device_type):
        return tuple(tensors.values())
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in tensors.values())


def _check(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mode: str, backend: str | None
) -> str:
    """Raise on anything the kernels cannot take; return the implementation's name."""
    check_choice("mode", mode, MODES)
    if q.dim() != 4:
        raise ValueError(message("q", describe(q), "shape [batch, tokens, heads, head_dim]"))
    batch, tokens, heads, head_dim = q.shape
    if q.dtype not in _DTYPES:
        raise TypeError(message("q", str(q.dtype), "float16, bfloat16, float32 or float64"))
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(message(name, describe(x), f"q's shape {tuple(q.shape)}"))
    prefix_len = prefix_k.shape[1] if prefix_k.dim() == 4 else -1
    for name, x in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if x.dim() != 4 or x.shape[0] not in (1, batch) or x.shape[2:] != q.shape[2:]:
            takes = f"shape [{batch} or 1, prefix_len, {heads}, {head_dim}]"
            raise ValueError(message(name, describe(x), takes))
    if prefix_v.shape != prefix_k.shape:
        raise ValueError(message("prefix_v", describe(prefix_v), f"prefix_k's shape {tuple(prefix_k.shape)}"))
    for name, x in (("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if x.dtype != q.dtype:
            raise TypeError(message(name, str(x.dtype), f"q's dtype {q.dtype}"))
        if x.device != q.device:
            raise ValueError(message(name, f"a tensor on {x.device}", f"q's device {q.device}"))
    if mode == "additive" and prefix_len != tokens:
        takes = f"{tokens} in mode 'additive', one per token"
        raise ValueError(message("prefix_k", f"{prefix_len} prefix keys", takes, "use mode 'gated' or 'concat'"))
    backend = resolve(backend, q.device)
    if backend == "triton":
        _check_triton(q)
    return backend


def _check_triton(q: Tensor) -> None:
    if q.shape[3] > MAX_HEAD_DIM:
        takes = f"at most {MAX_HEAD_DIM} with the triton backend"
        raise ValueError(message("q", f"head_dim {q.shape[3]}", takes, "use backend='torch'"))
    if q.dtype == torch.float64 and q.device.type == "cuda":
        takes = "float16, bfloat16 or float32 with the triton backend"
        raise TypeError(message("q", "float64", takes, "use backend='torch'"))
    if q.dtype == torch.bfloat16 and q.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        takes = "a GPU of compute capability 8.0 or newer for bfloat16"
        raise TypeError(message("q", f"bfloat16 on {torch.cuda.get_device_name(q.device)}", takes, "use float16"))


def _gate_per_head(gate: float | Tensor, q: Tensor) -> Tensor:
    """The gate as [H], float32 (float64 beside float64 inputs), on q's device."""
    heads = q.shape[2] if q.dim() == 4 else q.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not isinstance(gate, Tensor):
        if not isinstance(gate, (int, float)):
            raise TypeError(message("gate", f"a {type(gate).__name__}", "a number or a torch.Tensor"))
        return torch.full((heads,), float(gate), dtype=dtype, device=q.device)
    if gate.dim() > 1 or (gate.dim() == 1 and gate.shape[0] not in (1, heads)):
        raise ValueError(message("gate", describe(gate), f"a number or a tensor of shape [], [1] or [{heads}]"))
    if gate.device != q.device:
        raise ValueError(message("gate", f"a tensor on {gate.device}", f"q's device {q.device}"))
    if not gate.is_floating_point():
        raise TypeError(message("gate", str(gate.dtype), "a floating dtype"))
    return gate.to(dtype).expand(heads).contiguous()


def _readable(x: Tensor) -> Tensor:
    """`x` itself if its innermost stride is 1, as in every view of a projection; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
