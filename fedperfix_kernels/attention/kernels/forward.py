"""Forward kernel of prefix attention, for all three modes.

    gated     out = P v + g · P_p p_v              two softmaxes, combined in the epilogue
    concat    out = (P v, g · P_p p_v) under one   the same two sums, rescaled to their joint maximum
    additive  out = P v  with k + g·p_k, v + g·p_v built block by block

with P = softmax(q kᵀ·scale + bias), P_p = softmax(q p_kᵀ·scale). Scores and log-sum-exps are in base 2. One program
computes both branches of its queries: q is read once and out is written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedperfix_kernels.attention.kernels.blocks import (
    add_bias,
    load_keys,
    load_rows,
    loop_end,
    store_rows,
    valid_keys,
)


@triton.jit
def _attend_block(
    b_q, b_acc, b_sum, b_max, start, o_m,
    k_ptr, k_stride_n, v_ptr, v_stride_n, add_k_ptr, add_k_stride_n, add_v_ptr, add_v_stride_n,
    bias_ptr, key_mask_ptr, gate, tokens, length, factor,
    ADD: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, CHECK: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the unnormalised softmax(q kᵀ) v: (Σ p v, Σ p, max)."""
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_keys(k_ptr, k_stride_n, add_k_ptr, add_k_stride_n, gate, o_n, length, ADD, CHECK, D, BLOCK_D)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC) * factor  # [BLOCK_M, BLOCK_N]
    b_s = add_bias(b_s, bias_ptr, o_m[:, None], o_n[None, :], tokens, length, BIAS)
    if CHECK or MASK:
        b_s = tl.where(valid_keys(key_mask_ptr, o_n, length, MASK)[None, :], b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = b_new_max
    if BIAS or MASK:  # a row without a key so far has the maximum −∞, and −∞ − (−∞) is NaN
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_rescale = tl.exp2(b_max - b_shift)
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_v = load_keys(v_ptr, v_stride_n, add_v_ptr, add_v_stride_n, gate, o_n, length, ADD, CHECK, D, BLOCK_D)
    b_acc = b_acc * b_rescale[:, None]
    b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION, out_dtype=ACC)
    return b_acc, b_sum * b_rescale + tl.sum(b_p, 1), b_new_max


@triton.jit
def _attend(
    b_q, o_m,
    k_ptr, k_stride_n, v_ptr, v_stride_n, add_k_ptr, add_k_stride_n, add_v_ptr, add_v_stride_n,
    bias_ptr, key_mask_ptr, gate, tokens, length, factor,
    ADD: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, LOOP: tl.constexpr, TAIL: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Unnormalised softmax(q kᵀ) v of one branch: (Σ p v, Σ p, max), scores in base 2."""
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    b_sum = tl.zeros([BLOCK_M], dtype=ACC)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    full = loop_end(length, BLOCK_N, LOOP)
    # The smaller block comes first: behind a pipelined loop it makes ptxas serialise the loop's wgmmas (C7515).
    if TAIL > 0:
        b_acc, b_sum, b_max = _attend_block(
            b_q, b_acc, b_sum, b_max, full, o_m,
            k_ptr, k_stride_n, v_ptr, v_stride_n, add_k_ptr, add_k_stride_n, add_v_ptr, add_v_stride_n,
            bias_ptr, key_mask_ptr, gate, tokens, length, factor,
            ADD, BIAS, MASK, True, D, TAIL, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip
    if LOOP > 0:
        for start in range(0, full, BLOCK_N):
            b_acc, b_sum, b_max = _attend_block(
                b_q, b_acc, b_sum, b_max, start, o_m,
                k_ptr, k_stride_n, v_ptr, v_stride_n, add_k_ptr, add_k_stride_n, add_v_ptr, add_v_stride_n,
                bias_ptr, key_mask_ptr, gate, tokens, length, factor,
                ADD, BIAS, MASK, LOOP == 2, D, BLOCK_N, BLOCK_D, PRECISION, ACC,
            )  # fmt: skip
    return b_acc, b_sum, b_max


@triton.jit
def _normalised(b_acc, b_sum):
    """Σ p v / Σ p; a row without keys has sum 0 and contributes nothing, a NaN sum stays a NaN."""
    return b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None]


@triton.jit
def _log_sum_exp(b_sum, b_max):
    """max + log2(Σ p); ∞ for a row without keys, so that the backward pass finds P = exp2(s − ∞) = 0."""
    return tl.where(b_sum == 0, float("inf"), b_max + tl.log2(tl.where(b_sum == 0, 1.0, b_sum)))


@triton.jit(
    do_not_specialize=[
        "heads", "tokens", "prefix_len", "bias_groups", "gate_stride_b", "bias_stride_b", "bias_stride_h"
    ]
)  # fmt: skip
def attention_forward(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, gate_ptr, bias_ptr, key_mask_ptr, prefix_index_ptr,
    out_ptr, lse_ptr,
    q_stride_b, q_stride_n, q_stride_h,
    k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    prefix_k_stride_b, prefix_k_stride_n, prefix_k_stride_h,
    prefix_v_stride_b, prefix_v_stride_n, prefix_v_stride_h,
    gate_stride_b, bias_stride_b, bias_stride_h,
    heads, tokens, prefix_len, bias_groups, scale,
    MODE: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, INDEXED: tl.constexpr,
    LOOP: tl.constexpr, TAIL: tl.constexpr, PREFIX_LOOP: tl.constexpr, PREFIX_TAIL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [B, N, H, D] (contiguous) and lse [branches, B·H, N] of one block of queries of one (batch, head).

    Grid: (B·H, cdiv(N, BLOCK_M)). `gated` writes two rows of log-sum-exps, base and prefix; the others one.
    Image b takes row prefix_index[b] of the prefix table and of the gates with INDEXED, else its own row.
    """
    row = tl.program_id(0)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    client = tl.load(prefix_index_ptr + batch).to(tl.int64) if INDEXED else batch
    gate = tl.load(gate_ptr + client * gate_stride_b + head)
    one = tl.full([], 1.0, ACC)
    factor = one * scale * 1.4426950408889634  # scores in base 2: scale · log2(e)

    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    prefix_k_ptr += client * prefix_k_stride_b + head * prefix_k_stride_h
    prefix_v_ptr += client * prefix_v_stride_b + head * prefix_v_stride_h
    bias_ptr += batch % bias_groups * bias_stride_b + head * bias_stride_h
    key_mask_ptr += batch * tokens

    b_q = load_rows(q_ptr, q_stride_n, o_m, tokens, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_acc, b_sum, b_max = _attend(
        b_q, o_m, k_ptr, k_stride_n, v_ptr, v_stride_n,
        prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
        bias_ptr, key_mask_ptr, gate, tokens, tokens, factor,
        MODE == "additive", BIAS, MASK, LOOP, TAIL, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip

    lse_ptr += row.to(tl.int64) * tokens
    if MODE == "additive":
        b_out = _normalised(b_acc, b_sum)
        b_lse = _log_sum_exp(b_sum, b_max)
    else:
        score_gate = gate if MODE == "concat" else one
        b_prefix_acc, b_prefix_sum, b_prefix_max = _attend(
            b_q, o_m, prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            bias_ptr, key_mask_ptr, gate, tokens, prefix_len, factor * score_gate,
            False, False, False, PREFIX_LOOP, PREFIX_TAIL, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip
        if MODE == "gated":
            b_out = _normalised(b_acc, b_sum) + gate * _normalised(b_prefix_acc, b_prefix_sum)
            b_lse = _log_sum_exp(b_sum, b_max)
            lse_rows = tl.num_programs(0).to(tl.int64) * tokens
            b_prefix_lse = _log_sum_exp(b_prefix_sum, b_prefix_max)
            tl.store(lse_ptr + lse_rows + o_m, b_prefix_lse, mask=o_m < tokens)
        else:
            b_joint_max = tl.maximum(b_max, b_prefix_max)
            b_shift = tl.where(b_joint_max == float("-inf"), 0.0, b_joint_max)
            b_weight = tl.exp2(b_max - b_shift)
            b_prefix_weight = tl.exp2(b_prefix_max - b_shift)
            b_joint_sum = b_weight * b_sum + b_prefix_weight * b_prefix_sum
            b_out = b_weight[:, None] * b_acc + (gate * b_prefix_weight)[:, None] * b_prefix_acc
            b_out = _normalised(b_out, b_joint_sum)
            b_lse = _log_sum_exp(b_joint_sum, b_joint_max)
    tl.store(lse_ptr + o_m, b_lse, mask=o_m < tokens)
    out_ptr += (batch * tokens * heads + head) * D
    store_rows(out_ptr, heads * D, o_m, tokens, b_out, D, BLOCK_D)
