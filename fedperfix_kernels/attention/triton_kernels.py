"""Triton kernels of prefix attention: one forward kernel and two backward kernels for all three modes.

With s = q kᵀ·scale, P = softmax(s) and per-row log-sum-exps kept in base 2 (exp2 is the hardware's own):

    forward   gated     out = P v + g · P_p p_v              two softmaxes, combined in the epilogue
              concat    out = (P v, g · P_p p_v) under one   the same two sums, rescaled to their joint maximum
              additive  out = P v  with k + g·p_k, v + g·p_v built block by block
    backward  dP = dO vᵀ,  dS = P ∘ (dP − δ),  dq = dS k·scale,  dk = dSᵀ q·scale,  dv = Pᵀ dO

δ is rowsum(P ∘ dP) of the branch. In `concat` and `additive` it equals rowsum(dO ∘ out). In `gated`, out is the
sum of two branches, so the queries' kernel first makes one pass over the prefix keys for
δ_p = rowsum(P_p ∘ dO p_vᵀ), which is also the gate's gradient, and takes δ = rowsum(dO ∘ out) − g·δ_p. Nothing
but q, k, v, p_k, p_v, out and the log-sum-exps is kept from the forward pass.

Every sum has a fixed order and there are no atomics: the same input gives the same bits.

Block values are `b_*`, offsets `o_*`, masks `m_*`. Pointers of one (batch, head) are advanced in int64. All
tensors have an innermost stride of 1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_rows(ptr, stride_n, o_n, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `o_n` of one [length, D] matrix as [BLOCK, BLOCK_D], zero outside."""
    o_d = tl.arange(0, BLOCK_D)
    m_rows = (o_n < length)[:, None]
    mask = m_rows if D == BLOCK_D else m_rows & (o_d < D)[None, :]
    return tl.load(ptr + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, stride_n, o_n, length, b_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [BLOCK, BLOCK_D] to rows `o_n` of one [length, D] matrix, in the matrix's own dtype."""
    o_d = tl.arange(0, BLOCK_D)
    m_rows = (o_n < length)[:, None]
    mask = m_rows if D == BLOCK_D else m_rows & (o_d < D)[None, :]
    pointers = ptr + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    tl.store(pointers, b_rows.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_keys(
    ptr, stride_n, add_ptr, add_stride_n, gate, o_n, length,
    ADD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of k (or v); with ADD, rows of k + g·p_k rounded once to k's dtype."""
    b_rows = _load_rows(ptr, stride_n, o_n, length, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    if ADD:
        b_add = _load_rows(add_ptr, add_stride_n, o_n, length, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_rows = (b_rows + gate * b_add.to(gate.dtype)).to(b_rows.dtype)
    return b_rows


@triton.jit
def _attend(
    b_q, k_ptr, k_stride_n, v_ptr, v_stride_n, add_k_ptr, add_k_stride_n, add_v_ptr, add_v_stride_n,
    gate, length, factor,
    ADD: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Unnormalised softmax(q kᵀ) v of one branch: (Σ p v, Σ p, max), scores in base 2."""
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    b_sum = tl.zeros([BLOCK_M], dtype=ACC)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    for start in range(0, length, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k = _load_keys(k_ptr, k_stride_n, add_k_ptr, add_k_stride_n, gate, o_n, length, ADD, D, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC) * factor
        b_s = tl.where((o_n < length)[None, :], b_s, float("-inf"))  # [BLOCK_M, BLOCK_N]
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_rescale = tl.exp2(b_max - b_new_max)
        b_p = tl.exp2(b_s - b_new_max[:, None])
        b_v = _load_keys(v_ptr, v_stride_n, add_v_ptr, add_v_stride_n, gate, o_n, length, ADD, D, BLOCK_D)
        b_acc = b_acc * b_rescale[:, None]
        b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION, out_dtype=ACC)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_max = b_new_max
    return b_acc, b_sum, b_max


@triton.jit(do_not_specialize=["heads", "tokens", "prefix_len"])
def attention_forward(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, gate_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_n, q_stride_h,
    k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    prefix_k_stride_b, prefix_k_stride_n, prefix_k_stride_h,
    prefix_v_stride_b, prefix_v_stride_n, prefix_v_stride_h,
    heads, tokens, prefix_len, scale,
    MODE: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [B, N, H, D] (contiguous) and lse [branches, B·H, N] of one block of queries of one (batch, head).

    Grid: (B·H, cdiv(N, BLOCK_M)). `gated` writes two rows of log-sum-exps, base and prefix; the others one.
    """
    row = tl.program_id(0)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    gate = tl.load(gate_ptr + head)
    one = tl.full([], 1.0, ACC)
    factor = one * scale * 1.4426950408889634  # scores in base 2: scale · log2(e)

    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    prefix_k_ptr += batch * prefix_k_stride_b + head * prefix_k_stride_h
    prefix_v_ptr += batch * prefix_v_stride_b + head * prefix_v_stride_h

    q_ptr += batch * q_stride_b + head * q_stride_h
    b_q = _load_rows(q_ptr, q_stride_n, o_m, tokens, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_acc, b_sum, b_max = _attend(
        b_q, k_ptr, k_stride_n, v_ptr, v_stride_n,
        prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
        gate, tokens, factor, MODE == "additive", D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip

    lse_ptr += row.to(tl.int64) * tokens
    if MODE == "additive":
        b_out = b_acc / b_sum[:, None]
        b_lse = b_max + tl.log2(b_sum)
    else:
        score_gate = gate if MODE == "concat" else one
        b_prefix_acc, b_prefix_sum, b_prefix_max = _attend(
            b_q, prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            gate, prefix_len, factor * score_gate, False, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip
        if MODE == "gated":
            # An empty prefix has sum 0 and contributes nothing; a NaN sum stays a NaN.
            b_prefix_out = b_prefix_acc / tl.where(b_prefix_sum == 0, 1.0, b_prefix_sum)[:, None]
            b_out = b_acc / b_sum[:, None] + gate * b_prefix_out
            b_lse = b_max + tl.log2(b_sum)
            b_prefix_lse = b_prefix_max + tl.log2(b_prefix_sum)
            lse_rows = tl.num_programs(0).to(tl.int64) * tokens
            tl.store(lse_ptr + lse_rows + o_m, b_prefix_lse, mask=o_m < tokens)
        else:
            b_joint_max = tl.maximum(b_max, b_prefix_max)
            b_weight = tl.exp2(b_max - b_joint_max)
            b_prefix_weight = tl.exp2(b_prefix_max - b_joint_max)
            b_joint_sum = b_weight * b_sum + b_prefix_weight * b_prefix_sum
            b_out = b_weight[:, None] * b_acc + (gate * b_prefix_weight)[:, None] * b_prefix_acc
            b_out = b_out / b_joint_sum[:, None]
            b_lse = b_joint_max + tl.log2(b_joint_sum)
    tl.store(lse_ptr + o_m, b_lse, mask=o_m < tokens)
    out_ptr += (batch * tokens * heads + head) * D
    _store_rows(out_ptr, heads * D, o_m, tokens, b_out, D, BLOCK_D)


@triton.jit
def _row_delta(
    b_q, b_do, b_lse, k_ptr, k_stride_n, v_ptr, v_stride_n, length, factor,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """rowsum(P ∘ dO vᵀ) of one branch: [BLOCK_M]."""
    b_delta = tl.zeros([BLOCK_M], dtype=ACC)
    for start in range(0, length, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k = _load_rows(k_ptr, k_stride_n, o_n, length, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = _load_rows(v_ptr, v_stride_n, o_n, length, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC) * factor
        b_p = tl.where((o_n < length)[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
        b_delta += tl.sum(b_p * b_dp, 1)
    return b_delta


@triton.jit
def _query_gradient(
    b_q, b_do, b_lse, b_delta, k_ptr, k_stride_n, v_ptr, v_stride_n,
    add_k_ptr, add_k_stride_n, add_v_ptr, add_v_stride_n,
    gate, length, factor, value_gate, score_scale,
    ADD: tl.constexpr, SUM_GATE: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(dS k [BLOCK_M, BLOCK_D], rowsum(dS ∘ q kᵀ·score_scale + P ∘ dO vᵀ) [BLOCK_M]) of one branch.

    The second value is the gate's gradient where the gate multiplies both k and v (`concat`); it is only
    summed with SUM_GATE.
    """
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    b_dgate = tl.zeros([BLOCK_M], dtype=ACC)
    for start in range(0, length, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k = _load_keys(k_ptr, k_stride_n, add_k_ptr, add_k_stride_n, gate, o_n, length, ADD, D, BLOCK_D)
        b_v = _load_keys(v_ptr, v_stride_n, add_v_ptr, add_v_stride_n, gate, o_n, length, ADD, D, BLOCK_D)
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_M, BLOCK_N]
        # A padded key scores 0, and exp2(0 − lse) can overflow: mask P itself.
        b_p = tl.where((o_n < length)[None, :], tl.exp2(b_qk * factor - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
        b_ds = b_p * (value_gate * b_dp - b_delta[:, None])
        if SUM_GATE:
            b_dgate += tl.sum(b_ds * b_qk * score_scale + b_p * b_dp, 1)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION, out_dtype=ACC)
    return b_dq, b_dgate


@triton.jit(do_not_specialize=["heads", "tokens", "prefix_len"])
def attention_backward_queries(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, gate_ptr, out_ptr, dout_ptr, lse_ptr,
    dq_ptr, delta_ptr, dgate_ptr,
    q_stride_b, q_stride_n, q_stride_h,
    k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    prefix_k_stride_b, prefix_k_stride_n, prefix_k_stride_h,
    prefix_v_stride_b, prefix_v_stride_n, prefix_v_stride_h,
    dout_stride_b, dout_stride_n, dout_stride_h,
    dq_stride_b, dq_stride_n, dq_stride_h,
    heads, tokens, prefix_len, scale,
    MODE: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq, δ [branches, B·H, N] and the gate's partial sums [B·H, blocks] of one block of queries.

    Grid: (B·H, cdiv(N, BLOCK_M)). In `additive` the gate's gradient comes from the keys' kernel instead.
    """
    row = tl.program_id(0)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < tokens
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    gate = tl.load(gate_ptr + head)
    one = tl.full([], 1.0, ACC)
    factor = one * scale * 1.4426950408889634

    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    prefix_k_ptr += batch * prefix_k_stride_b + head * prefix_k_stride_h
    prefix_v_ptr += batch * prefix_v_stride_b + head * prefix_v_stride_h
    q_ptr += batch * q_stride_b + head * q_stride_h
    dout_ptr += batch * dout_stride_b + head * dout_stride_h
    out_ptr += (batch * tokens * heads + head) * D
    lse_ptr += row.to(tl.int64) * tokens
    delta_ptr += row.to(tl.int64) * tokens
    rows_of_branch = tl.num_programs(0).to(tl.int64) * tokens

    b_q = _load_rows(q_ptr, q_stride_n, o_m, tokens, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_do = _load_rows(dout_ptr, dout_stride_n, o_m, tokens, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_out = _load_rows(out_ptr, heads * D, o_m, tokens, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    # A row past the end has lse = ∞, so its P is 0.
    b_lse = tl.load(lse_ptr + o_m, mask=m_m, other=float("inf"))  # [BLOCK_M]
    b_delta = tl.sum(b_out.to(ACC) * b_do.to(ACC), 1)

    b_prefix_lse = b_lse
    b_prefix_delta = b_delta
    if MODE == "gated":
        b_prefix_lse = tl.load(lse_ptr + rows_of_branch + o_m, mask=m_m, other=float("inf"))  # [BLOCK_M]
        b_row_delta = _row_delta(
            b_q, b_do, b_prefix_lse, prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            prefix_len, factor, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip
        b_prefix_delta = gate * b_row_delta
        b_delta -= b_prefix_delta
        tl.store(delta_ptr + rows_of_branch + o_m, b_prefix_delta, mask=m_m)
        tl.store(dgate_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(b_row_delta, 0))
    tl.store(delta_ptr + o_m, b_delta, mask=m_m)

    b_dq, _ = _query_gradient(
        b_q, b_do, b_lse, b_delta, k_ptr, k_stride_n, v_ptr, v_stride_n,
        prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
        gate, tokens, factor, one, scale,
        MODE == "additive", False, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    if MODE != "additive":
        score_gate = gate if MODE == "concat" else one
        b_prefix_dq, b_dgate = _query_gradient(
            b_q, b_do, b_prefix_lse, b_prefix_delta,
            prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            prefix_k_ptr, prefix_k_stride_n, prefix_v_ptr, prefix_v_stride_n,
            gate, prefix_len, factor * score_gate, gate, scale,
            False, MODE == "concat", D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip
        b_dq += score_gate * b_prefix_dq
        if MODE == "concat":
            tl.store(dgate_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(b_dgate, 0))
    dq_ptr += batch * dq_stride_b + head * dq_stride_h
    _store_rows(dq_ptr, dq_stride_n, o_m, tokens, b_dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["heads", "tokens", "length", "batch", "batch_per_program"])
def attention_backward_keys(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, gate_ptr, dout_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dprefix_k_ptr, dprefix_v_ptr, dgate_ptr,
    q_stride_b, q_stride_n, q_stride_h,
    k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    prefix_k_stride_b, prefix_k_stride_n, prefix_k_stride_h,
    prefix_v_stride_b, prefix_v_stride_n, prefix_v_stride_h,
    dout_stride_b, dout_stride_n, dout_stride_h,
    dkv_stride_b, dkv_stride_n, dkv_stride_h,
    dprefix_stride_b, dprefix_stride_n, dprefix_stride_h,
    batch, batch_per_program, heads, tokens, length, scale,
    ADD: tl.constexpr, SCORE_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, summed over `batch_per_program` images that share these keys.

    Grid: (cdiv(batch, batch_per_program)·H, cdiv(length, BLOCK_N)). Serves the base branch (no gates), the prefix
    branch of `gated` (VALUE_GATE) and of `concat` (both gates), and `additive` (ADD): there dp_k = g·dk,
    dp_v = g·dv and the gate's partial sum Σ (dk ∘ p_k + dv ∘ p_v) are written as well.
    """
    row = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    first = part * batch_per_program
    last = tl.minimum(first + batch_per_program, batch)
    gate = tl.load(gate_ptr + head)
    one = tl.full([], 1.0, ACC)
    score_gate = gate if SCORE_GATE else one
    value_gate = gate if VALUE_GATE else one
    factor = one * scale * 1.4426950408889634 * score_gate

    k_ptr += first * k_stride_b + head * k_stride_h
    v_ptr += first * v_stride_b + head * v_stride_h
    prefix_k_ptr += first * prefix_k_stride_b + head * prefix_k_stride_h
    prefix_v_ptr += first * prefix_v_stride_b + head * prefix_v_stride_h
    b_k = _load_keys(k_ptr, k_stride_n, prefix_k_ptr, prefix_k_stride_n, gate, o_n, length, ADD, D, BLOCK_D)
    b_v = _load_keys(v_ptr, v_stride_n, prefix_v_ptr, prefix_v_stride_n, gate, o_n, length, ADD, D, BLOCK_D)

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    for image in range(first, last):
        q_image = q_ptr + image * q_stride_b + head * q_stride_h
        dout_image = dout_ptr + image * dout_stride_b + head * dout_stride_h
        rows = (image * heads + head) * tokens
        for start in range(0, tokens, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < tokens
            b_q = _load_rows(q_image, q_stride_n, o_m, tokens, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            b_do = _load_rows(dout_image, dout_stride_n, o_m, tokens, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            b_lse = tl.load(lse_ptr + rows + o_m, mask=m_m, other=float("inf"))  # [BLOCK_M]
            b_delta = tl.load(delta_ptr + rows + o_m, mask=m_m, other=0.0)  # [BLOCK_M]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC) * factor
            b_p = tl.exp2(b_s - b_lse[None, :])  # [BLOCK_N, BLOCK_M]
            b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION, out_dtype=ACC)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=ACC)
            b_ds = b_p * (value_gate * b_dp - b_delta[None, :])
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION, out_dtype=ACC)

    b_dk = b_dk * (scale * score_gate)
    b_dv = b_dv * value_gate
    dk_ptr += part * dkv_stride_b + head * dkv_stride_h
    dv_ptr += part * dkv_stride_b + head * dkv_stride_h
    _store_rows(dk_ptr, dkv_stride_n, o_n, length, b_dk, D, BLOCK_D)
    _store_rows(dv_ptr, dkv_stride_n, o_n, length, b_dv, D, BLOCK_D)
    if ADD:
        dprefix_k_ptr += part * dprefix_stride_b + head * dprefix_stride_h
        dprefix_v_ptr += part * dprefix_stride_b + head * dprefix_stride_h
        _store_rows(dprefix_k_ptr, dprefix_stride_n, o_n, length, gate * b_dk, D, BLOCK_D)
        _store_rows(dprefix_v_ptr, dprefix_stride_n, o_n, length, gate * b_dv, D, BLOCK_D)
        b_pk = _load_rows(prefix_k_ptr, prefix_k_stride_n, o_n, length, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_pv = _load_rows(prefix_v_ptr, prefix_v_stride_n, o_n, length, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        # Rows past the end may hold exp2(−lse) = ∞; their p_k and p_v are 0, so leave them out by the mask.
        b_rows = tl.sum(b_dk * b_pk.to(ACC) + b_dv * b_pv.to(ACC), 1)
        dgate = tl.sum(tl.where(o_n < length, b_rows, 0.0), 0)
        tl.store(dgate_ptr + row * tl.num_programs(1) + tl.program_id(1), dgate)
