"""What the attention kernels share: loading blocks of rows, and the scores of one block of keys.

Block values are `b_*`, offsets `o_*`, masks `m_*`. All matrices have an innermost stride of 1. Scores and their
log-sum-exps are in base 2, because exp2 is the hardware's own exponential: s₂ = s · log2(e).

Rows are walked in one of three ways (`row_blocks` in `configs.py` chooses): LOOP = 2 loops over blocks that are all
checked against the end; LOOP = 1 loops over full blocks unchecked, and one block of TAIL rows holds the rest, the
smallest power of two that can (197 keys are 3 · 64 + 16 instead of 4 · 64); LOOP = 0 has only that last block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def loop_end(length, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    """Where the loop over rows ends: after the full blocks (LOOP = 1), after all rows (2), before it begins (0)."""
    if LOOP == 2:
        return length
    if LOOP == 1:
        return length // BLOCK * BLOCK
    return 0


@triton.jit
def load_rows(ptr, stride_n, o_n, length, CHECK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `o_n` of one [length, D] matrix as [BLOCK, BLOCK_D]; with CHECK, zero from `length` on."""
    o_d = tl.arange(0, BLOCK_D)
    pointers = ptr + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    if CHECK:
        m_rows = (o_n < length)[:, None]
        return tl.load(pointers, mask=m_rows if D == BLOCK_D else m_rows & (o_d < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride_n, o_n, length, b_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [BLOCK, BLOCK_D] to rows `o_n` of one [length, D] matrix, in the matrix's own dtype."""
    o_d = tl.arange(0, BLOCK_D)
    m_rows = (o_n < length)[:, None]
    mask = m_rows if D == BLOCK_D else m_rows & (o_d < D)[None, :]
    pointers = ptr + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    tl.store(pointers, b_rows.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(
    ptr, stride_n, add_ptr, add_stride_n, gate, o_n, length,
    ADD: tl.constexpr, CHECK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of k (or v); with ADD, rows of k + g·p_k rounded once to k's dtype."""
    b_rows = load_rows(ptr, stride_n, o_n, length, CHECK, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    if ADD:
        b_add = load_rows(add_ptr, add_stride_n, o_n, length, CHECK, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_rows = (b_rows + gate * b_add.to(gate.dtype)).to(b_rows.dtype)
    return b_rows


@triton.jit
def add_bias(b_s, bias_ptr, o_m, o_n, tokens, length, BIAS: tl.constexpr):
    """Scores in base 2 plus the bias [tokens, length] at rows `o_m` and columns `o_n`, which broadcast to them."""
    if BIAS:
        m_bias = (o_m < tokens) & (o_n < length)
        b_bias = tl.load(bias_ptr + o_m.to(tl.int64) * length + o_n, mask=m_bias, other=0.0)
        b_s += b_bias.to(b_s.dtype) * 1.4426950408889634
    return b_s


@triton.jit
def valid_keys(key_mask_ptr, o_n, length, MASK: tl.constexpr):
    """Which of the keys `o_n` exist and, with MASK, take part: [BLOCK_N]."""
    m_keys = o_n < length
    if MASK:
        m_keys = m_keys & (tl.load(key_mask_ptr + o_n, mask=m_keys, other=0) != 0)
    return m_keys
