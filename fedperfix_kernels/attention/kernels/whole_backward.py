"""Backward pass in one kernel, for few keys: a program holds all keys of a branch of one (batch, head) on chip.

    dP = dO vᵀ,  dS = P ∘ (dP − δ),  dq = dS k·scale,  dk = dSᵀ q·scale,  dv = Pᵀ dO

It walks the queries once per branch and makes dq, dk and dv of a block from the same P and dP: 5 matrix products
instead of the 7 of the split form (9 for the prefix branch of `gated`), every tensor is read once, and in `gated`
δ is rowsum(P ∘ dP) of the values at hand, so no kernel and no buffer is spent on it. dq of the base branch waits in
a float32 buffer until the prefix branch adds to it. Every sum has a fixed order and there are no atomics.

Scores are transposed, [keys, queries]: the keys' side stays in place, with its two accumulators.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedperfix_kernels.attention.kernels.blocks import load_keys, load_rows, loop_end, store_rows


@triton.jit
def _query_block(
    start, b_k, b_v, b_dk, b_dv,
    q_ptr, q_stride_n, dout_ptr, dout_stride_n, out_ptr, out_stride_n, lse_ptr,
    dq_ptr, dq_stride_n, partial_ptr, tokens, length, factor, value_gate, score_scale,
    OWN_DELTA: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, CHECK: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add one block of queries to (dSᵀ q, Pᵀ dO) [BLOCK_N, BLOCK_D] and write its dq."""
    o_m = start + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    b_q = load_rows(q_ptr, q_stride_n, o_m, tokens, CHECK, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_do = load_rows(dout_ptr, dout_stride_n, o_m, tokens, CHECK, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    # A row past the end has lse = ∞, so its P is 0.
    b_lse = tl.load(lse_ptr + o_m, mask=o_m < tokens, other=float("inf"))  # [BLOCK_M]

    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC) * factor  # [BLOCK_N, BLOCK_M]
    b_p = tl.where((o_n < length)[:, None], tl.exp2(b_s - b_lse[None, :]), 0.0)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=ACC) * value_gate
    if OWN_DELTA:
        b_delta = tl.sum(b_p * b_dp, 0)
    else:
        b_out = load_rows(out_ptr, out_stride_n, o_m, tokens, CHECK, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        b_delta = tl.sum(b_out.to(ACC) * b_do.to(ACC), 1)
    b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION, out_dtype=ACC)
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    b_dk += tl.dot(b_ds, b_q, input_precision=PRECISION, out_dtype=ACC)
    b_dq = tl.trans(tl.dot(tl.trans(b_k), b_ds, input_precision=PRECISION, out_dtype=ACC)) * score_scale
    if not FIRST:
        b_dq += load_rows(partial_ptr, BLOCK_D, o_m, tokens, True, BLOCK_D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if LAST:
        store_rows(dq_ptr, dq_stride_n, o_m, tokens, b_dq, D, BLOCK_D)
    else:
        store_rows(partial_ptr, BLOCK_D, o_m, tokens, b_dq, BLOCK_D, BLOCK_D)
    return b_dk, b_dv


@triton.jit
def _branch(
    q_ptr, q_stride_n, dout_ptr, dout_stride_n, out_ptr, out_stride_n, lse_ptr,
    k_ptr, k_stride_n, v_ptr, v_stride_n, p_k_ptr, p_k_stride_n, p_v_ptr, p_v_stride_n,
    dq_ptr, dq_stride_n, partial_ptr, dk_ptr, dv_ptr, dkv_stride_n, dprefix_k_ptr, dprefix_v_ptr, dprefix_stride_n,
    tokens, length, gate, scale,
    BRANCH: tl.constexpr, LOOP: tl.constexpr, TAIL: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, OWN_DELTA: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All queries against all keys of one branch; returns the gate's gradient of it (0 of `base`)."""
    one = tl.full([], 1.0, ACC)
    score_gate = gate if BRANCH == "concat" else one
    value_gate = gate if BRANCH == "concat" or BRANCH == "gated" else one
    score_scale = one * scale * score_gate
    factor = score_scale * 1.4426950408889634
    ADD: tl.constexpr = BRANCH == "additive"

    o_n = tl.arange(0, BLOCK_N)
    b_k = load_keys(k_ptr, k_stride_n, p_k_ptr, p_k_stride_n, gate, o_n, length, ADD, True, D, BLOCK_D)
    b_v = load_keys(v_ptr, v_stride_n, p_v_ptr, p_v_stride_n, gate, o_n, length, ADD, True, D, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    full = loop_end(tokens, BLOCK_M, LOOP)
    if LOOP > 0:
        for start in range(0, full, BLOCK_M):
            b_dk, b_dv = _query_block(
                start, b_k, b_v, b_dk, b_dv,
                q_ptr, q_stride_n, dout_ptr, dout_stride_n, out_ptr, out_stride_n, lse_ptr,
                dq_ptr, dq_stride_n, partial_ptr, tokens, length, factor, value_gate, score_scale,
                OWN_DELTA, FIRST, LAST, LOOP == 2, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
            )  # fmt: skip
    if TAIL > 0:
        b_dk, b_dv = _query_block(
            full, b_k, b_v, b_dk, b_dv,
            q_ptr, q_stride_n, dout_ptr, dout_stride_n, out_ptr, out_stride_n, lse_ptr,
            dq_ptr, dq_stride_n, partial_ptr, tokens, length, factor, value_gate, score_scale,
            OWN_DELTA, FIRST, LAST, True, D, TAIL, BLOCK_N, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip

    b_dk = b_dk * scale
    store_rows(dk_ptr, dkv_stride_n, o_n, length, b_dk * score_gate, D, BLOCK_D)
    store_rows(dv_ptr, dkv_stride_n, o_n, length, b_dv * value_gate, D, BLOCK_D)
    dgate = one * 0.0
    if BRANCH != "base":
        b_pv = load_rows(p_v_ptr, p_v_stride_n, o_n, length, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_terms = b_dv * b_pv.to(ACC)
        if BRANCH != "gated":
            b_pk = load_rows(p_k_ptr, p_k_stride_n, o_n, length, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            b_terms += b_dk * b_pk.to(ACC)
        dgate = tl.sum(tl.sum(b_terms, 1), 0)
    if ADD:
        store_rows(dprefix_k_ptr, dprefix_stride_n, o_n, length, gate * b_dk, D, BLOCK_D)
        store_rows(dprefix_v_ptr, dprefix_stride_n, o_n, length, gate * b_dv, D, BLOCK_D)
    return dgate


@triton.jit(do_not_specialize=["heads", "tokens", "prefix_len"])
def attention_backward_whole(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, gate_ptr, out_ptr, dout_ptr, lse_ptr,
    dq_ptr, dk_ptr, dv_ptr, dprefix_k_ptr, dprefix_v_ptr, dgate_ptr, partial_ptr,
    q_stride_b, q_stride_n, q_stride_h,
    k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    prefix_k_stride_b, prefix_k_stride_n, prefix_k_stride_h,
    prefix_v_stride_b, prefix_v_stride_n, prefix_v_stride_h,
    dout_stride_b, dout_stride_n, dout_stride_h,
    dqkv_stride_b, dqkv_stride_n, dqkv_stride_h,
    dprefix_stride_b, dprefix_stride_n, dprefix_stride_h,
    heads, tokens, prefix_len, scale,
    MODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, LOOP: tl.constexpr, TAIL: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv, and per image dp_k, dp_v [B, L, H, D] and dgate [B·H], of one (batch, head).

    Grid: (B·H,). BLOCK_N ≥ N and BLOCK_L ≥ L; BLOCK_L is 0 without a prefix branch (`additive`, or L = 0).
    partial [B·H, N, BLOCK_D] float32 holds dq between the branches. A prefix shared by the batch gets one gradient
    per image, to be summed.
    """
    row = tl.program_id(0)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    gate = tl.load(gate_ptr + head)
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    prefix_k_ptr += batch * prefix_k_stride_b + head * prefix_k_stride_h
    prefix_v_ptr += batch * prefix_v_stride_b + head * prefix_v_stride_h
    dout_ptr += batch * dout_stride_b + head * dout_stride_h
    dq_ptr += batch * dqkv_stride_b + head * dqkv_stride_h
    dk_ptr += batch * dqkv_stride_b + head * dqkv_stride_h
    dv_ptr += batch * dqkv_stride_b + head * dqkv_stride_h
    dprefix_k_ptr += batch * dprefix_stride_b + head * dprefix_stride_h
    dprefix_v_ptr += batch * dprefix_stride_b + head * dprefix_stride_h
    out_ptr += (batch * tokens * heads + head) * D
    lse_ptr += row.to(tl.int64) * tokens
    partial_ptr += row.to(tl.int64) * tokens * BLOCK_D

    dgate = _branch(
        q_ptr, q_stride_n, dout_ptr, dout_stride_n, out_ptr, heads * D, lse_ptr,
        k_ptr, k_stride_n, v_ptr, v_stride_n,
        prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
        dq_ptr, dqkv_stride_n, partial_ptr, dk_ptr, dv_ptr, dqkv_stride_n,
        dprefix_k_ptr, dprefix_v_ptr, dprefix_stride_n, tokens, tokens, gate, scale,
        "additive" if MODE == "additive" else "base", LOOP, TAIL, True, BLOCK_L == 0, MODE == "gated",
        D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    if BLOCK_L > 0:
        tl.debug_barrier()  # other threads of this program wrote the partial dq
        if MODE == "gated":
            lse_ptr += tl.num_programs(0).to(tl.int64) * tokens
        dgate = _branch(
            q_ptr, q_stride_n, dout_ptr, dout_stride_n, out_ptr, heads * D, lse_ptr,
            prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            dq_ptr, dqkv_stride_n, partial_ptr, dprefix_k_ptr, dprefix_v_ptr, dprefix_stride_n,
            dprefix_k_ptr, dprefix_v_ptr, dprefix_stride_n, tokens, prefix_len, gate, scale,
            MODE, LOOP, TAIL, False, True, MODE == "gated", D, BLOCK_M, BLOCK_L, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip
    tl.store(dgate_ptr + row, dgate)
