"""The public functions of prefix attention: check, cast, choose an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from fedperfix_kernels.attention import composed, op, reference
from fedperfix_kernels.attention.configs import MAX_HEAD_DIM
from fedperfix_kernels.backends import resolve
from fedperfix_kernels.checks import check_choice, check_tensor, describe, message

MODES = ("gated", "concat", "additive")
FUSED = ("triton", "native")  # backends with kernels of their own, forward and backward
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
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    prefix_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention with a prefix branch beside it, fused where a GPU is there.

    With A(q, k, v) = softmax(q kᵀ · scale + bias) v:

    - `gated`: A(q, k, v) + g · A(q, p_k, p_v) (He et al., ICLR 2022, with a learned gate)
    - `concat`: A(q, [k; g·p_k], [v; g·p_v]) (Sun et al., ICCV 2023, equations 3 and 5)
    - `additive`: A(q, k + g·p_k, v + g·p_v), L = N (Yu et al., arXiv 2210.00788)

    Args:
        q, k, v: [B, N, H, D], any strides; views of a packed projection are read in place.
        prefix_k, prefix_v: [B, L, H, D], or [1, L, H, D] for one prefix shared by the batch, or with
            `prefix_index` a table [T, L, H, D].
        gate: g, a number or a tensor of shape [], [1] or [H] (one value per head), or with `prefix_index` also a
            table [T, H].
        mode: one of `MODES`.
        scale: factor of the scores; None is 1/√D.
        bias: [H, N, N] or [G, H or 1, N, N], added to the scaled scores of the base branch (Swin's relative
            positions and window masks, Liu et al., ICCV 2021). G divides B, and image b has bias b mod G. It has a
            gradient.
        key_mask: bool [B, N], False for tokens that are no keys (padding). The prefix is never masked; an image
            without any key has a base branch of zeros.
        prefix_index: integers [B], from 0 to T − 1: each image's row of the prefix table (and of the gates), so
            that one batch serves many clients.
        backend: `auto`, `triton`, `native`, `torch` or `reference`; None is `auto`.

    Under autocast the inputs are cast to its dtype, as in scaled_dot_product_attention. The triton backend
    computes float32 products in full precision unless PyTorch's own matrix products are set to TF32. The table's
    gradient is dense: to train the prefixes of a few of many clients, pass those clients' rows as the table.

    Returns:
        [B, N, H, D], contiguous with the triton backend.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it. Indices
            on a GPU are checked there, without waiting: one out of range fails as it does in torch.index_select.
    """
    q, k, v, prefix_k, prefix_v = _autocast({"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v})
    backend = _check(q, k, v, prefix_k, prefix_v, mode, backend, indexed=prefix_index is not None)
    clients = None if prefix_index is None else prefix_k.shape[0]
    gate = _gate_per_head(gate, q, clients)
    bias, key_mask = _checked_bias(bias, q), _checked_mask(key_mask, q)
    index = _checked_index(prefix_index, q, clients)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if q.numel() == 0:
        return torch.zeros_like(q)
    if backend in FUSED:
        tensors = map(_readable, (q, k, v, prefix_k, prefix_v))
        return op.apply(*tensors, gate, bias, key_mask, index, mode, scale, backend, packed=False)
    if index is not None:
        prefix_k, prefix_v = prefix_k[index], prefix_v[index]
        gate = gate[index] if gate.dim() == 2 else gate
    implementation = composed if backend == "torch" else reference
    with torch.autocast(q.device.type, enabled=False):
        return implementation.prefix_attention(q, k, v, prefix_k, prefix_v, gate, mode, scale, bias, key_mask)


def packed_prefix_attention(
    qkv: Tensor,
    prefix: Tensor,
    gate: float | Tensor,
    *,
    mode: str = "gated",
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    prefix_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`prefix_attention` on packed projections, whose gradients are written packed as well.

    Args:
        qkv: [B, N, 3, H, D], any strides.
        prefix: [B, L, 2, H, D] (p_k, p_v), or [1, L, 2, H, D] for one prefix shared by the batch, or with
            `prefix_index` a table [T, L, 2, H, D].
        gate, mode, scale, bias, key_mask, prefix_index, backend: as in `prefix_attention`.

    Returns:
        [B, N, H, D].

    Raises:
        ValueError, TypeError: as `prefix_attention`.
    """
    qkv, prefix = _autocast({"qkv": qkv, "prefix": prefix})
    for name, tensor, parts in (("qkv", qkv, 3), ("prefix", prefix, 2)):
        if tensor.dim() != 5 or tensor.shape[2] != parts:
            raise ValueError(message(name, describe(tensor), f"shape [batch, tokens, {parts}, heads, head_dim]"))
    q, k, v, prefix_k, prefix_v = (*qkv.unbind(2), *prefix.unbind(2))
    implementation = resolve(backend, qkv.device, _native_limit(q, backend))
    if implementation not in FUSED or qkv.numel() == 0:
        return prefix_attention(
            q, k, v, prefix_k, prefix_v, gate,
            mode=mode, scale=scale, bias=bias, key_mask=key_mask, prefix_index=prefix_index, backend=backend,
        )  # fmt: skip
    _check(q, k, v, prefix_k, prefix_v, mode, backend, indexed=prefix_index is not None)
    clients = None if prefix_index is None else prefix.shape[0]
    gate = _gate_per_head(gate, q, clients)
    options = (_checked_bias(bias, q), _checked_mask(key_mask, q), _checked_index(prefix_index, q, clients))
    scale = float(qkv.shape[-1] ** -0.5 if scale is None else scale)
    tensors = _readable(qkv), _readable(prefix)
    return op.apply(*tensors, gate, *options, mode, scale, implementation, packed=True)


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mode: str,
    backend: str | None,
    indexed: bool,
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
        fitting = x.dim() == 4 and (x.shape[0] in (1, batch) or (indexed and x.shape[0] > 0))
        if not fitting or x.shape[2:] != q.shape[2:]:
            rows = "clients" if indexed else f"{batch} or 1"
            takes = f"shape [{rows}, prefix_len, {heads}, {head_dim}]"
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
    backend = resolve(backend, q.device, _native_limit(q, backend))
    if backend == "triton":
        _check_triton(q)
    return backend


def _native_limit(q: Tensor, backend: str | None) -> str:
    """Why the native kernels do not take q; empty if they do. They are slow in float64, for whoever asks for it."""
    if q.dtype == torch.float64 and backend != "native":
        return "the native kernels are slow in float64"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the native kernels take a head_dim of at most {MAX_HEAD_DIM}, and q has {q.shape[-1]}"
    return ""


def _check_triton(q: Tensor) -> None:
    if q.shape[3] > MAX_HEAD_DIM:
        takes = f"at most {MAX_HEAD_DIM} with the triton backend"
        raise ValueError(message("q", f"head_dim {q.shape[3]}", takes, "use backend='torch'"))
    if q.dtype == torch.float64 and q.device.type == "cuda":
        takes = "float16, bfloat16 or float32 with the triton backend"
        raise TypeError(message("q", "float64", takes, "use backend='torch'"))


def _gate_per_head(gate: float | Tensor, q: Tensor, clients: int | None) -> Tensor:
    """The gate as [H], or [T, H] for T clients: float32 (float64 beside float64 inputs), on q's device."""
    heads = q.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not isinstance(gate, Tensor):
        if not isinstance(gate, (int, float)):
            raise TypeError(message("gate", f"a {type(gate).__name__}", "a number or a torch.Tensor"))
        return torch.full((heads,), float(gate), dtype=dtype, device=q.device)
    table = clients is not None and gate.shape == (clients, heads)
    if not table and (gate.dim() > 1 or (gate.dim() == 1 and gate.shape[0] not in (1, heads))):
        takes = f"a number or a tensor of shape [], [1] or [{heads}]"
        takes += "" if clients is None else f" or [{clients}, {heads}]"
        raise ValueError(message("gate", describe(gate), takes))
    if gate.device != q.device:
        raise ValueError(message("gate", f"a tensor on {gate.device}", f"q's device {q.device}"))
    if not gate.is_floating_point():
        raise TypeError(message("gate", str(gate.dtype), "a floating dtype"))
    gate = gate.to(dtype)
    return gate.contiguous() if table else gate.expand(heads).contiguous()


def _checked_bias(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """[G, H, N, N] with contiguous rows and columns (heads may repeat with stride 0)."""
    if bias is None:
        return None
    check_tensor("bias", bias)
    batch, tokens, heads, _ = q.shape
    given = bias[None] if bias.dim() == 3 else bias
    fitting = given.dim() == 4 and given.shape[1] in (1, heads) and given.shape[2:] == (tokens, tokens)
    if not fitting or given.shape[0] == 0 or batch % given.shape[0]:
        takes = (
            f"shape [{heads}, {tokens}, {tokens}] or [G, {heads} or 1, {tokens}, {tokens}], G a divisor of {batch}"
        )
        raise ValueError(message("bias", describe(bias), takes))
    if not bias.is_floating_point():
        raise TypeError(message("bias", str(bias.dtype), "a floating dtype", "pass bool masks of keys as key_mask"))
    if bias.device != q.device:
        raise ValueError(message("bias", f"a tensor on {bias.device}", f"q's device {q.device}"))
    if given.stride()[2:] != (tokens, 1):
        given = given.contiguous()
    return given.expand(-1, heads, -1, -1)


def _checked_mask(key_mask: Tensor | None, q: Tensor) -> Tensor | None:
    if key_mask is None:
        return None
    check_tensor("key_mask", key_mask)
    if key_mask.shape != q.shape[:2]:
        raise ValueError(message("key_mask", describe(key_mask), f"shape {tuple(q.shape[:2])}"))
    if key_mask.dtype != torch.bool:
        takes = "torch.bool, True for tokens that are keys"
        raise TypeError(message("key_mask", str(key_mask.dtype), takes))
    if key_mask.device != q.device:
        raise ValueError(message("key_mask", f"a tensor on {key_mask.device}", f"q's device {q.device}"))
    return key_mask.contiguous()


def _checked_index(prefix_index: Tensor | None, q: Tensor, clients: int | None) -> Tensor | None:
    """int64 [B] with every entry checked: on the CPU here, on a GPU by the lookup itself."""
    if prefix_index is None:
        return None
    check_tensor("prefix_index", prefix_index)
    if prefix_index.shape != q.shape[:1]:
        raise ValueError(message("prefix_index", describe(prefix_index), f"shape ({q.shape[0]},), one per image"))
    if prefix_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(message("prefix_index", str(prefix_index.dtype), "torch.int32 or torch.int64"))
    if prefix_index.device != q.device:
        raise ValueError(message("prefix_index", f"a tensor on {prefix_index.device}", f"q's device {q.device}"))
    try:
        return torch.arange(clients, device=q.device).index_select(0, prefix_index)
    except IndexError as error:
        takes = f"numbers from 0 to {clients - 1}, rows of the prefix table"
        raise ValueError(message("prefix_index", f"a number out of range ({error})", takes)) from None


def _readable(x: Tensor) -> Tensor:
    """`x` itself if its innermost stride is 1, as in every view of a projection; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
