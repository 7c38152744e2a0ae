"""Allocates what the Triton kernels write and launches them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedperfix_kernels.attention import triton_kernels as kernels
from fedperfix_kernels.attention.configs import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    FORWARD,
    HALF,
    IEEE,
    TF32,
    LaunchConfig,
    launch_config,
    padded_head_dim,
)

# Programs that share a prefix's gradient sum their images one after the other; this many (image groups × heads
# × key blocks) fill a large GPU, and each group costs one float32 copy of the prefix.
_TARGET_PROGRAMS = 1024


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor, mode: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Prefix attention.

    Args:
        q, k, v: [B, N, H, D]; prefix_k, prefix_v: [B or 1, L, H, D]; innermost stride 1.
        gate: [H] float32 (float64 with float64 inputs).
        mode: `gated`, `concat` or `additive`.
        scale: factor of the scores.

    Returns:
        out [B, N, H, D] contiguous, and the base-2 log-sum-exps [branches, B, H, N]: base and prefix in
        `gated`, one joint row otherwise.
    """
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((branches(mode), batch, heads, tokens), dtype=gate.dtype, device=q.device)
    config = _config(FORWARD, q)
    with torch.cuda.device_of(q):
        kernels.attention_forward[batch * heads, triton.cdiv(tokens, config.block_m)](
            q, k, v, prefix_k, prefix_v, gate, out, lse,
            *_strides(q), *_strides(k), *_strides(v), *_strides(prefix_k), *_strides(prefix_v),
            heads, tokens, prefix_k.shape[1], scale,
            MODE=mode, **_constants(q, config),
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor,
    out: Tensor,
    lse: Tensor,
    mode: str,
    scale: float,
    need_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prefix attention.

    Args:
        dout: [B, N, H, D], innermost stride 1.
        q, k, v, prefix_k, prefix_v, gate, mode, scale: as given to `forward`.
        out, lse: as returned by `forward`.
        need_prefix: False leaves out the prefix pair's gradient (its tensor is then empty).

    Returns:
        dqkv [B, N, 3, H, D], dprefix [B or 1, L, 2, H, D], dgate [H].
    """
    batch, tokens, heads, head_dim = q.shape
    dqkv = torch.empty((batch, tokens, 3, heads, head_dim), dtype=q.dtype, device=q.device)
    dq, dk, dv = dqkv.unbind(2)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        dgate = _launch_queries(dout, q, k, v, prefix_k, prefix_v, gate, out, lse, delta, dq, mode, scale)
        if mode == "additive":
            shared = prefix_k.shape[0] == 1 and batch > 1
            dprefix = _empty_prefix(q, batch, prefix_k.shape[1], gate.dtype if shared else q.dtype)
            dgate = _launch_keys(
                dout, q, k, v, prefix_k, prefix_v, gate, lse[0], delta[0], dk, dv, dprefix, mode, scale,
                add=True,
            )  # fmt: skip
            if shared:
                dprefix = dprefix.sum(0, keepdim=True).to(q.dtype)
        else:
            _launch_keys(
                dout, q, k, v, prefix_k, prefix_v, gate, lse[0], delta[0], dk, dv, None, mode, scale
            )  # fmt: skip
            if need_prefix:
                dprefix = _prefix_gradient(dout, q, prefix_k, prefix_v, gate, lse, delta, mode, scale)
            else:
                dprefix = q.new_empty((0, 0, 2, heads, head_dim))
    return dqkv, dprefix, dgate.sum((0, 2)).to(gate.dtype)


def branches(mode: str) -> int:
    """Rows of log-sum-exps that a mode keeps: one per softmax."""
    return 2 if mode == "gated" else 1


def _prefix_gradient(
    dout: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor,
    lse: Tensor,
    delta: Tensor,
    mode: str,
    scale: float,
) -> Tensor:
    """[B or 1, L, 2, H, D]; a prefix shared by the batch is summed in two stages of fixed order."""
    batch, _, heads, _ = q.shape
    prefix_len = prefix_k.shape[1]
    shared = prefix_k.shape[0] == 1 and batch > 1
    per_program = 1
    if shared:
        config = _config(BACKWARD_KEYS, q)
        programs = heads * max(1, triton.cdiv(prefix_len, config.block_n))
        per_program = triton.cdiv(batch, max(1, min(batch, _TARGET_PROGRAMS // programs)))
    parts = triton.cdiv(batch, per_program)
    dprefix = _empty_prefix(q, parts, prefix_len, gate.dtype if shared else q.dtype)
    dprefix_k, dprefix_v = dprefix.unbind(2)
    _launch_keys(
        dout, q, prefix_k, prefix_v, prefix_k, prefix_v, gate, lse[-1], delta[-1], dprefix_k, dprefix_v, None,
        mode, scale, score_gate=mode == "concat", value_gate=True, batch_per_program=per_program,
    )  # fmt: skip
    return dprefix.sum(0, keepdim=True).to(q.dtype) if shared else dprefix


def _launch_queries(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    mode: str,
    scale: float,
) -> Tensor:
    """Write dq and delta; return the gate's partial sums [B, H, blocks] (not written in `additive`)."""
    batch, tokens, heads, _head_dim = q.shape
    config = _config(BACKWARD_QUERIES, q)
    blocks = triton.cdiv(tokens, config.block_m)
    dgate = torch.empty((batch, heads, blocks), dtype=gate.dtype, device=q.device)
    kernels.attention_backward_queries[batch * heads, blocks](
        q, k, v, prefix_k, prefix_v, gate, out, dout, lse, dq, delta, dgate,
        *_strides(q), *_strides(k), *_strides(v), *_strides(prefix_k), *_strides(prefix_v),
        *_strides(dout), *_strides(dq),
        heads, tokens, prefix_k.shape[1], scale,
        MODE=mode, **_constants(q, config),
    )  # fmt: skip
    return dgate


def _launch_keys(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    dprefix: Tensor | None,
    mode: str,
    scale: float,
    *,
    add: bool = False,
    score_gate: bool = False,
    value_gate: bool = False,
    batch_per_program: int = 1,
) -> Tensor:
    """Write dk, dv (and dprefix with `add`); return the gate's partial sums [B, H, blocks] (only with `add`)."""
    batch, tokens, heads, _head_dim = q.shape
    length = k.shape[1]
    config = _config(BACKWARD_KEYS, q)
    blocks = triton.cdiv(length, config.block_n)
    parts = triton.cdiv(batch, batch_per_program)
    dgate = torch.empty((parts, heads, blocks), dtype=gate.dtype, device=q.device)
    if blocks == 0:  # an empty prefix: nothing to write
        return dgate
    dprefix_k, dprefix_v = (dk, dv) if dprefix is None else dprefix.unbind(2)
    kernels.attention_backward_keys[parts * heads, blocks](
        q, k, v, prefix_k, prefix_v, gate, dout, lse, delta, dk, dv, dprefix_k, dprefix_v, dgate,
        *_strides(q), *_strides(k), *_strides(v), *_strides(prefix_k), *_strides(prefix_v),
        *_strides(dout), *_strides(dk), *_strides(dprefix_k),
        batch, batch_per_program, heads, tokens, length, scale,
        ADD=add, SCORE_GATE=score_gate, VALUE_GATE=value_gate, **_constants(q, config),
    )  # fmt: skip
    return dgate


def _empty_prefix(q: Tensor, parts: int, prefix_len: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((parts, prefix_len, 2, q.shape[2], q.shape[3]), dtype=dtype, device=q.device)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head; a batch of one (a shared prefix) does not advance."""
    return (0 if x.shape[0] == 1 else x.stride(0), x.stride(1), x.stride(2))


def _config(kernel: str, q: Tensor) -> LaunchConfig:
    return launch_config(kernel, _products(q), q.shape[3], amd=torch.version.hip is not None)


def _constants(q: Tensor, config: LaunchConfig) -> dict[str, object]:
    return {
        "D": q.shape[3],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": padded_head_dim(q.shape[3]),
        "PRECISION": "tf32" if _products(q) == TF32 else "ieee",
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # the compiler's default changes with Triton 3.10
    }


def _products(q: Tensor) -> str:
    """The kind of products; float32 uses TF32 only where PyTorch's own matrix products do."""
    if q.dtype in (torch.float16, torch.bfloat16):
        return HALF
    if q.dtype == torch.float32 and q.device.type == "cuda" and torch.version.hip is None:
        return TF32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else IEEE
    return IEEE
