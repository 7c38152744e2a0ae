"""Backward pass in several kernels: one over the queries, then one over the keys of each branch.

    dP = dO vᵀ,  dS = P ∘ (dP − δ),  dq = dS k·scale,  dk = dSᵀ q·scale,  dv = Pᵀ dO,  dbias = Σ dS

δ is rowsum(P ∘ dP) of the branch. In `concat` and `additive` it equals rowsum(dO ∘ out). In `gated`, out is the
sum of two branches, so the queries' kernel first makes one pass over the prefix keys for
δ_p = g · rowsum(P_p ∘ dO p_vᵀ) and takes δ = rowsum(dO ∘ out) − δ_p. Nothing but q, k, v, p_k, p_v, out and the
log-sum-exps is kept from the forward pass. The gate's gradient is Σ dv' ∘ p_v (and + Σ dk' ∘ p_k where the gate
multiplies the keys too), with dk' and dv' the gradients of the gated pair: the keys' kernels have both at hand.

Every sum has a fixed order and there are no atomics: the same input gives the same bits.
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
def _probabilities(
    b_q, b_lse, o_m, o_n, b_k, bias_ptr, key_mask_ptr, tokens, length, factor,
    BIAS: tl.constexpr, MASK: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """P = exp2(s − lse) of one block: [BLOCK_M, BLOCK_N], zero for keys that take no part."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC) * factor
    b_s = add_bias(b_s, bias_ptr, o_m[:, None], o_n[None, :], tokens, length, BIAS)
    b_p = tl.exp2(b_s - b_lse[:, None])
    if CHECK or MASK:  # a padded key scores 0, and exp2(0 − lse) can overflow: mask P itself
        b_p = tl.where(valid_keys(key_mask_ptr, o_n, length, MASK)[None, :], b_p, 0.0)
    return b_p


@triton.jit
def _row_delta_block(
    b_q, b_do, b_lse, b_delta, start, o_m, k_ptr, k_stride_n, v_ptr, v_stride_n, length, factor,
    CHECK: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_rows(k_ptr, k_stride_n, o_n, length, CHECK, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_v = load_rows(v_ptr, v_stride_n, o_n, length, CHECK, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_p = _probabilities(
        b_q, b_lse, o_m, o_n, b_k, k_ptr, k_ptr, length, length, factor, False, False, CHECK, PRECISION, ACC
    )
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
    return b_delta + tl.sum(b_p * b_dp, 1)


@triton.jit
def _row_delta(
    b_q, b_do, b_lse, o_m, k_ptr, k_stride_n, v_ptr, v_stride_n, length, factor,
    LOOP: tl.constexpr, TAIL: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """rowsum(P ∘ dO vᵀ) of one branch: [BLOCK_M]."""
    b_delta = tl.zeros([BLOCK_M], dtype=ACC)
    full = loop_end(length, BLOCK_N, LOOP)
    if LOOP > 0:
        for start in range(0, full, BLOCK_N):
            b_delta = _row_delta_block(
                b_q, b_do, b_lse, b_delta, start, o_m, k_ptr, k_stride_n, v_ptr, v_stride_n, length, factor,
                LOOP == 2, D, BLOCK_N, BLOCK_D, PRECISION, ACC,
            )  # fmt: skip
    if TAIL > 0:
        b_delta = _row_delta_block(
            b_q, b_do, b_lse, b_delta, full, o_m, k_ptr, k_stride_n, v_ptr, v_stride_n, length, factor,
            True, D, TAIL, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip
    return b_delta


@triton.jit
def _query_gradient_block(
    b_q, b_do, b_lse, b_delta, b_dq, start, o_m,
    k_ptr, k_stride_n, v_ptr, v_stride_n, add_k_ptr, add_k_stride_n, add_v_ptr, add_v_stride_n,
    bias_ptr, key_mask_ptr, gate, tokens, length, factor, value_gate,
    ADD: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, CHECK: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_keys(k_ptr, k_stride_n, add_k_ptr, add_k_stride_n, gate, o_n, length, ADD, CHECK, D, BLOCK_D)
    b_v = load_keys(v_ptr, v_stride_n, add_v_ptr, add_v_stride_n, gate, o_n, length, ADD, CHECK, D, BLOCK_D)
    b_p = _probabilities(
        b_q, b_lse, o_m, o_n, b_k, bias_ptr, key_mask_ptr, tokens, length, factor, BIAS, MASK, CHECK, PRECISION, ACC
    )
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_M, BLOCK_N]
    b_ds = b_p * (value_gate * b_dp - b_delta[:, None])
    return b_dq + tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _query_gradient(
    b_q, b_do, b_lse, b_delta, o_m,
    k_ptr, k_stride_n, v_ptr, v_stride_n, add_k_ptr, add_k_stride_n, add_v_ptr, add_v_stride_n,
    bias_ptr, key_mask_ptr, gate, tokens, length, factor, value_gate,
    ADD: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, LOOP: tl.constexpr, TAIL: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dS k of one branch: [BLOCK_M, BLOCK_D]."""
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    full = loop_end(length, BLOCK_N, LOOP)
    if LOOP > 0:
        for start in range(0, full, BLOCK_N):
            b_dq = _query_gradient_block(
                b_q, b_do, b_lse, b_delta, b_dq, start, o_m,
                k_ptr, k_stride_n, v_ptr, v_stride_n, add_k_ptr, add_k_stride_n, add_v_ptr, add_v_stride_n,
                bias_ptr, key_mask_ptr, gate, tokens, length, factor, value_gate,
                ADD, BIAS, MASK, LOOP == 2, D, BLOCK_N, BLOCK_D, PRECISION, ACC,
            )  # fmt: skip
    if TAIL > 0:
        b_dq = _query_gradient_block(
            b_q, b_do, b_lse, b_delta, b_dq, full, o_m,
            k_ptr, k_stride_n, v_ptr, v_stride_n, add_k_ptr, add_k_stride_n, add_v_ptr, add_v_stride_n,
            bias_ptr, key_mask_ptr, gate, tokens, length, factor, value_gate,
            ADD, BIAS, MASK, True, D, TAIL, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip
    return b_dq


@triton.jit(
    do_not_specialize=[
        "heads", "tokens", "prefix_len", "bias_groups", "gate_stride_b", "bias_stride_b", "bias_stride_h"
    ]
)  # fmt: skip
def attention_backward_queries(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, gate_ptr, bias_ptr, key_mask_ptr, prefix_index_ptr,
    out_ptr, dout_ptr, lse_ptr, dq_ptr, delta_ptr,
    q_stride_b, q_stride_n, q_stride_h,
    k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    prefix_k_stride_b, prefix_k_stride_n, prefix_k_stride_h,
    prefix_v_stride_b, prefix_v_stride_n, prefix_v_stride_h,
    gate_stride_b, bias_stride_b, bias_stride_h,
    dout_stride_b, dout_stride_n, dout_stride_h,
    dq_stride_b, dq_stride_n, dq_stride_h,
    heads, tokens, prefix_len, bias_groups, scale,
    MODE: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, INDEXED: tl.constexpr,
    LOOP: tl.constexpr, TAIL: tl.constexpr, PREFIX_LOOP: tl.constexpr, PREFIX_TAIL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq and δ [branches, B·H, N] of one block of queries.

    Grid: (B·H, cdiv(N, BLOCK_M)).
    """
    row = tl.program_id(0)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < tokens
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    client = tl.load(prefix_index_ptr + batch).to(tl.int64) if INDEXED else batch
    gate = tl.load(gate_ptr + client * gate_stride_b + head)
    one = tl.full([], 1.0, ACC)
    factor = one * scale * 1.4426950408889634

    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    prefix_k_ptr += client * prefix_k_stride_b + head * prefix_k_stride_h
    prefix_v_ptr += client * prefix_v_stride_b + head * prefix_v_stride_h
    bias_ptr += batch % bias_groups * bias_stride_b + head * bias_stride_h
    key_mask_ptr += batch * tokens
    q_ptr += batch * q_stride_b + head * q_stride_h
    dout_ptr += batch * dout_stride_b + head * dout_stride_h
    out_ptr += (batch * tokens * heads + head) * D
    lse_ptr += row.to(tl.int64) * tokens
    delta_ptr += row.to(tl.int64) * tokens
    rows_of_branch = tl.num_programs(0).to(tl.int64) * tokens

    b_q = load_rows(q_ptr, q_stride_n, o_m, tokens, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_do = load_rows(dout_ptr, dout_stride_n, o_m, tokens, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_out = load_rows(out_ptr, heads * D, o_m, tokens, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    # A row past the end has lse = ∞, so its P is 0.
    b_lse = tl.load(lse_ptr + o_m, mask=m_m, other=float("inf"))  # [BLOCK_M]
    b_delta = tl.sum(b_out.to(ACC) * b_do.to(ACC), 1)

    b_prefix_lse = b_lse
    b_prefix_delta = b_delta
    if MODE == "gated":
        b_prefix_lse = tl.load(lse_ptr + rows_of_branch + o_m, mask=m_m, other=float("inf"))  # [BLOCK_M]
        b_prefix_delta = gate * _row_delta(
            b_q, b_do, b_prefix_lse, o_m, prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            prefix_len, factor, PREFIX_LOOP, PREFIX_TAIL, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip
        b_delta -= b_prefix_delta
        tl.store(delta_ptr + rows_of_branch + o_m, b_prefix_delta, mask=m_m)
    tl.store(delta_ptr + o_m, b_delta, mask=m_m)

    b_dq = _query_gradient(
        b_q, b_do, b_lse, b_delta, o_m, k_ptr, k_stride_n, v_ptr, v_stride_n,
        prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
        bias_ptr, key_mask_ptr, gate, tokens, tokens, factor, one,
        MODE == "additive", BIAS, MASK, LOOP, TAIL, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    if MODE != "additive":
        score_gate = gate if MODE == "concat" else one
        b_dq += score_gate * _query_gradient(
            b_q, b_do, b_prefix_lse, b_prefix_delta, o_m,
            prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            bias_ptr, key_mask_ptr, gate, tokens, prefix_len, factor * score_gate, gate,
            False, False, False, PREFIX_LOOP, PREFIX_TAIL, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip
    dq_ptr += batch * dq_stride_b + head * dq_stride_h
    store_rows(dq_ptr, dq_stride_n, o_m, tokens, b_dq * scale, D, BLOCK_D)


@triton.jit
def _key_gradient_block(
    b_k, b_v, b_dk, b_dv, m_keys, o_n, start,
    q_ptr, q_stride_n, dout_ptr, dout_stride_n, lse_ptr, delta_ptr, bias_ptr,
    tokens, length, factor, value_gate,
    BIAS: tl.constexpr, MASK: tl.constexpr, CHECK: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add one block of queries to (dSᵀ q, Pᵀ dO): [BLOCK_N, BLOCK_D] each."""
    o_m = start + tl.arange(0, BLOCK_M)
    b_q = load_rows(q_ptr, q_stride_n, o_m, tokens, CHECK, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_do = load_rows(dout_ptr, dout_stride_n, o_m, tokens, CHECK, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_lse = tl.load(lse_ptr + o_m, mask=o_m < tokens, other=float("inf"))  # [BLOCK_M]
    b_delta = tl.load(delta_ptr + o_m, mask=o_m < tokens, other=0.0)  # [BLOCK_M]
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC) * factor
    b_s = add_bias(b_s, bias_ptr, o_m[None, :], o_n[:, None], tokens, length, BIAS)
    b_p = tl.exp2(b_s - b_lse[None, :])  # [BLOCK_N, BLOCK_M]
    if MASK:
        b_p = tl.where(m_keys[:, None], b_p, 0.0)
    b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION, out_dtype=ACC)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=ACC)
    b_ds = b_p * (value_gate * b_dp - b_delta[None, :])
    b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION, out_dtype=ACC)
    return b_dk, b_dv


@triton.jit(
    do_not_specialize=[
        "heads", "tokens", "length", "bias_groups", "batch", "batch_per_program",
        "gate_stride_b", "bias_stride_b", "bias_stride_h",
    ]
)  # fmt: skip
def attention_backward_keys(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, gate_ptr, bias_ptr, key_mask_ptr, order_ptr, bounds_ptr,
    dout_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dprefix_k_ptr, dprefix_v_ptr, dgate_ptr,
    q_stride_b, q_stride_n, q_stride_h,
    k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    prefix_k_stride_b, prefix_k_stride_n, prefix_k_stride_h,
    prefix_v_stride_b, prefix_v_stride_n, prefix_v_stride_h,
    gate_stride_b, bias_stride_b, bias_stride_h,
    dout_stride_b, dout_stride_n, dout_stride_h,
    dkv_stride_b, dkv_stride_n, dkv_stride_h,
    dprefix_stride_b, dprefix_stride_n, dprefix_stride_h,
    batch, batch_per_program, heads, tokens, length, bias_groups, scale,
    BRANCH: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, INDEXED: tl.constexpr,
    LOOP: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, summed over the images that have these keys, and the gate's partial sums.

    Grid: (groups·H, cdiv(length, BLOCK_N)). A group is `batch_per_program` images one after the other, or with
    INDEXED the images order[bounds[group]] … order[bounds[group + 1] − 1] of one client. BRANCH is `base`, `gated`
    or `concat` (the prefix branch of that mode; k and v are then p_k and p_v), or `additive`: there dp_k = g·dk and
    dp_v = g·dv are written as well. All but `base` write dgate [groups·H, blocks].
    """
    row = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    if INDEXED:
        first = tl.load(bounds_ptr + group)
        last = tl.load(bounds_ptr + group + 1)
        own = group  # the row of the table
    else:
        first = group * batch_per_program
        last = tl.minimum(first + batch_per_program, batch)
        own = first
    gate = tl.load(gate_ptr + own * gate_stride_b + head)
    one = tl.full([], 1.0, ACC)
    score_gate = gate if BRANCH == "concat" else one
    value_gate = gate if BRANCH == "concat" or BRANCH == "gated" else one
    factor = one * scale * 1.4426950408889634 * score_gate

    k_ptr += own * k_stride_b + head * k_stride_h
    v_ptr += own * v_stride_b + head * v_stride_h
    prefix_k_ptr += own * prefix_k_stride_b + head * prefix_k_stride_h
    prefix_v_ptr += own * prefix_v_stride_b + head * prefix_v_stride_h
    ADD: tl.constexpr = BRANCH == "additive"
    b_k = load_keys(k_ptr, k_stride_n, prefix_k_ptr, prefix_k_stride_n, gate, o_n, length, ADD, True, D, BLOCK_D)
    b_v = load_keys(v_ptr, v_stride_n, prefix_v_ptr, prefix_v_stride_n, gate, o_n, length, ADD, True, D, BLOCK_D)

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    full = loop_end(tokens, BLOCK_M, LOOP)
    for item in range(first, last):
        image = tl.load(order_ptr + item).to(tl.int64) if INDEXED else item
        q_image = q_ptr + image * q_stride_b + head * q_stride_h
        dout_image = dout_ptr + image * dout_stride_b + head * dout_stride_h
        lse_image = lse_ptr + (image * heads + head) * tokens
        delta_image = delta_ptr + (image * heads + head) * tokens
        bias_image = bias_ptr + image % bias_groups * bias_stride_b + head * bias_stride_h
        m_keys = valid_keys(key_mask_ptr + image * length, o_n, length, MASK)
        if LOOP > 0:
            for start in range(0, full, BLOCK_M):
                b_dk, b_dv = _key_gradient_block(
                    b_k, b_v, b_dk, b_dv, m_keys, o_n, start,
                    q_image, q_stride_n, dout_image, dout_stride_n, lse_image, delta_image, bias_image,
                    tokens, length, factor, value_gate, BIAS, MASK, LOOP == 2, D, BLOCK_M, BLOCK_D, PRECISION, ACC,
                )  # fmt: skip
        if TAIL > 0:
            b_dk, b_dv = _key_gradient_block(
                b_k, b_v, b_dk, b_dv, m_keys, o_n, full,
                q_image, q_stride_n, dout_image, dout_stride_n, lse_image, delta_image, bias_image,
                tokens, length, factor, value_gate, BIAS, MASK, True, D, TAIL, BLOCK_D, PRECISION, ACC,
            )  # fmt: skip

    b_dk = b_dk * scale
    dk_ptr += group * dkv_stride_b + head * dkv_stride_h
    dv_ptr += group * dkv_stride_b + head * dkv_stride_h
    store_rows(dk_ptr, dkv_stride_n, o_n, length, b_dk * score_gate, D, BLOCK_D)
    store_rows(dv_ptr, dkv_stride_n, o_n, length, b_dv * value_gate, D, BLOCK_D)
    if BRANCH != "base":
        b_pv = load_rows(prefix_v_ptr, prefix_v_stride_n, o_n, length, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_rows = tl.sum(b_dv * b_pv.to(ACC), 1)
        if BRANCH != "gated":
            b_pk = load_rows(prefix_k_ptr, prefix_k_stride_n, o_n, length, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            b_rows += tl.sum(b_dk * b_pk.to(ACC), 1)
        # Rows past the end may hold exp2(−lse) = ∞; leave them out by the mask.
        dgate = tl.sum(tl.where(o_n < length, b_rows, 0.0), 0)
        tl.store(dgate_ptr + row * tl.num_programs(1) + tl.program_id(1), dgate)
    if ADD:
        dprefix_k_ptr += group * dprefix_stride_b + head * dprefix_stride_h
        dprefix_v_ptr += group * dprefix_stride_b + head * dprefix_stride_h
        store_rows(dprefix_k_ptr, dprefix_stride_n, o_n, length, gate * b_dk, D, BLOCK_D)
        store_rows(dprefix_v_ptr, dprefix_stride_n, o_n, length, gate * b_dv, D, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "heads", "tokens", "bias_groups", "images", "images_per_program",
        "gate_stride_b", "bias_stride_b", "bias_stride_h",
    ]
)  # fmt: skip
def attention_backward_bias(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, gate_ptr, bias_ptr, key_mask_ptr, prefix_index_ptr,
    dout_ptr, lse_ptr, delta_ptr, dbias_ptr,
    q_stride_b, q_stride_n, q_stride_h,
    k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    prefix_k_stride_b, prefix_k_stride_n, prefix_k_stride_h,
    prefix_v_stride_b, prefix_v_stride_n, prefix_v_stride_h,
    gate_stride_b, bias_stride_b, bias_stride_h,
    dout_stride_b, dout_stride_n, dout_stride_h,
    images, images_per_program, heads, tokens, bias_groups, scale,
    ADD: tl.constexpr, MASK: tl.constexpr, INDEXED: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dbias [parts, groups, H, N, N] of one block of scores: dS summed over the images that share this bias.

    Grid: (parts·groups·H, cdiv(N, BLOCK_M), cdiv(N, BLOCK_N)). Image j·groups + i is the j-th that has bias i; a
    part is `images_per_program` of them. The scores are recomputed, so nothing of size B·N² is written.
    """
    row = tl.program_id(0)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = (row % heads).to(tl.int64)
    bias_group = (row // heads % bias_groups).to(tl.int64)
    first = (row // heads // bias_groups).to(tl.int64) * images_per_program
    last = tl.minimum(first + images_per_program, images)
    one = tl.full([], 1.0, ACC)
    factor = one * scale * 1.4426950408889634
    bias_ptr += bias_group * bias_stride_b + head * bias_stride_h

    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for item in range(first, last):
        batch = item * bias_groups + bias_group
        client = tl.load(prefix_index_ptr + batch).to(tl.int64) if INDEXED else batch
        gate = tl.load(gate_ptr + client * gate_stride_b + head)
        row_of_image = (batch * heads + head) * tokens
        k_image = k_ptr + batch * k_stride_b + head * k_stride_h
        v_image = v_ptr + batch * v_stride_b + head * v_stride_h
        pk_image = prefix_k_ptr + client * prefix_k_stride_b + head * prefix_k_stride_h
        pv_image = prefix_v_ptr + client * prefix_v_stride_b + head * prefix_v_stride_h
        b_q = load_rows(q_ptr + batch * q_stride_b + head * q_stride_h, q_stride_n, o_m, tokens, True, D, BLOCK_D)
        b_do = load_rows(
            dout_ptr + batch * dout_stride_b + head * dout_stride_h, dout_stride_n, o_m, tokens, True, D, BLOCK_D
        )  # [BLOCK_M, BLOCK_D], as b_q
        b_k = load_keys(k_image, k_stride_n, pk_image, prefix_k_stride_n, gate, o_n, tokens, ADD, True, D, BLOCK_D)
        b_v = load_keys(v_image, v_stride_n, pv_image, prefix_v_stride_n, gate, o_n, tokens, ADD, True, D, BLOCK_D)
        b_lse = tl.load(lse_ptr + row_of_image + o_m, mask=o_m < tokens, other=float("inf"))  # [BLOCK_M]
        b_delta = tl.load(delta_ptr + row_of_image + o_m, mask=o_m < tokens, other=0.0)  # [BLOCK_M]
        b_p = _probabilities(
            b_q, b_lse, o_m, o_n, b_k, bias_ptr, key_mask_ptr + batch * tokens, tokens, tokens, factor,
            True, MASK, True, PRECISION, ACC,
        )  # fmt: skip
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
        b_dbias += b_p * (b_dp - b_delta[:, None])
    pointers = dbias_ptr + row.to(tl.int64) * tokens * tokens + o_m.to(tl.int64)[:, None] * tokens + o_n[None, :]
    tl.store(pointers, b_dbias, mask=(o_m < tokens)[:, None] & (o_n < tokens)[None, :])
