"""Allocates what the native kernels write and calls them, on a CPU."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_double, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from fedperfix_kernels.attention.inputs import Inputs, branches
from fedperfix_kernels.native import library

_MODES = {"gated": 0, "concat": 1, "additive": 2}
# A prefix row's images are divided into at most so many chunks, which run side by side. Each chunk costs a float32
# copy of the row's gradient, and the chunks decide the order of its sum: the number of threads must not.
_CHUNKS = 8


class _Call(ctypes.Structure):
    """`struct attention` of library.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "prefix_k", "prefix_v", "gate", "bias", "key_mask")),
        *((name, c_void_p) for name in ("dout", "out", "lse", "dqkv", "dprefix", "partial", "dgate", "dbias")),
        *((name, c_void_p) for name in ("images", "chunk_start", "row", "row_chunks")),
        *((f"{name}_strides", c_int64 * 3) for name in ("q", "k", "v", "prefix_k", "prefix_v", "dout")),
        ("gate_stride", c_int64),
        ("bias_strides", c_int64 * 2),
        *((name, c_int64) for name in ("batch", "tokens", "heads", "head_dim", "prefix_len")),
        *((name, c_int64) for name in ("rows", "chunks", "bias_groups", "parts")),
        ("scale", c_double),
        ("dtype", c_int32),
        ("mode", c_int32),
    )


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Prefix attention.

    Returns:
        out [B, N, H, D] contiguous, and the base-2 log-sum-exps [branches, B, H, N]: base and prefix in
        `gated`, one joint row otherwise.
    """
    q = inputs.q
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((branches(inputs.mode), batch, heads, tokens), dtype=inputs.gate.dtype)
    call, _kept, _ = _call(inputs)
    call.out, call.lse = out.data_ptr(), lse.data_ptr()
    library.call("attention_forward", call)
    return out, lse


def backward(
    dout: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, need_prefix: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of prefix attention.

    Args:
        dout: [B, N, H, D], innermost stride 1.
        inputs: as given to `forward`.
        out, lse: as returned by `forward`.
        need_prefix: False leaves out the gradients of the prefix pair and the gate (their tensors are then empty).
        need_bias: whether to compute the bias's gradient (else its tensor is empty).

    Returns:
        dqkv [B, N, 3, H, D], dprefix [B, 1 or T, L, 2, H, D], dgate as the gate, dbias [G, H, N, N] float32.
    """
    q, gate = inputs.q, inputs.gate
    batch, tokens, heads, head_dim = q.shape
    rows, length = inputs.prefix_k.shape[:2]
    call, _kept, divided = _call(inputs)
    dqkv = q.new_empty((batch, tokens, 3, heads, head_dim))
    dprefix = q.new_empty((rows, length, 2, heads, head_dim) if need_prefix else (0, 0, 2, heads, head_dim))
    per_image = gate.new_empty((batch, heads) if need_prefix else (0,))
    dbias = gate.new_empty(inputs.bias.shape if need_bias else (0,))
    partial = gate.new_empty((call.chunks if need_prefix and divided else 0, length, 2, heads, head_dim))
    call.dout, call.dout_strides = dout.data_ptr(), (c_int64 * 3)(*dout.stride()[:3])
    call.lse, call.dqkv, call.partial = lse.data_ptr(), dqkv.data_ptr(), partial.data_ptr()
    if need_prefix:
        # An empty tensor has no address, and NULL says that there is nothing to compute.
        call.dprefix, call.dgate = dprefix.data_ptr() or per_image.data_ptr(), per_image.data_ptr()
    if need_bias:
        call.dbias = dbias.data_ptr()
    library.call("attention_backward", call)
    return dqkv, dprefix, _of_gate(inputs, per_image) if need_prefix else per_image, dbias


def _of_gate(inputs: Inputs, per_image: Tensor) -> Tensor:
    """The gate's gradient [H] or [T, H] from that of each image [B, H]."""
    if inputs.gate.dim() == 1:
        return per_image.sum(0)
    return torch.zeros_like(inputs.gate).index_add_(0, inputs.prefix_index, per_image)


def _call(inputs: Inputs) -> tuple[_Call, dict[str, Tensor], bool]:
    """The struct without results, tensors that must live as long as it, and whether a row has several chunks."""
    q = inputs.q
    batch, tokens, heads, head_dim = q.shape
    row, images, chunk_start, row_chunks, divided = _division(inputs)
    kept = {"row": row, "images": images, "chunk_start": chunk_start, "row_chunks": row_chunks}
    call = _Call(
        batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, prefix_len=inputs.prefix_len,
        rows=inputs.prefix_k.shape[0], chunks=len(chunk_start) - 1, bias_groups=inputs.bias_groups,
        scale=inputs.scale, dtype=library.DTYPES[q.dtype], mode=_MODES[inputs.mode],
        gate_stride=inputs.gate.stride(0) if inputs.gate.dim() == 2 else 0,
    )  # fmt: skip
    for name in ("q", "k", "v", "prefix_k", "prefix_v"):
        tensor = getattr(inputs, name)
        setattr(call, name, tensor.data_ptr())
        setattr(call, f"{name}_strides", (c_int64 * 3)(*tensor.stride()[:3]))
    if inputs.bias is not None:
        kept["bias"] = bias = inputs.bias.to(inputs.gate.dtype)
        call.bias, call.bias_strides = bias.data_ptr(), (c_int64 * 2)(*bias.stride()[:2])
    if inputs.key_mask is not None:
        call.key_mask = inputs.key_mask.data_ptr()
    call.gate = inputs.gate.data_ptr()
    for name in ("row", "images", "chunk_start", "row_chunks"):
        setattr(call, name, kept[name].data_ptr())
    return call, kept, divided


def _division(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """Each image's row of the prefix [B], and `_chunks` of it."""
    batch, rows = inputs.q.shape[0], inputs.prefix_k.shape[0]
    if inputs.prefix_index is None:
        return _plain_division(batch, inputs.shared)
    row = inputs.prefix_index.to(torch.int64)
    return row, *_chunks(row, rows)


@functools.lru_cache(maxsize=64)
def _plain_division(batch: int, shared: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    row = torch.zeros(batch, dtype=torch.int64) if shared else torch.arange(batch)
    return row, *_chunks(row, 1 if shared else batch)


def _chunks(row: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Images in order of their rows, where each chunk of them starts, where each row's chunks start, and whether
    there are more chunks than rows with images."""
    images = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=rows)
    starts = counts.cumsum(0) - counts
    chunks = counts.clamp(max=_CHUNKS)
    row_chunks = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    of = torch.repeat_interleave(torch.arange(rows), chunks)  # each chunk's row
    within = torch.arange(len(of)) - row_chunks[of]
    chunk_start = starts[of] + within * counts[of] // chunks[of]
    return (
        images,
        torch.cat([chunk_start, chunk_start.new_tensor([len(row)])]),
        row_chunks,
        bool((chunks > 1).any()),
    )
