"""Triton kernels of aggregation. Everything is computed in float32, clients in order.

    weighted mean     out[p] = Σ_k share[k, layer(p)] · x[k, p]     (x = scale[k, block(p)] · int8, if quantised)
    trimmed mean      out[p] = mean of the values of rank trim … K − trim − 1 among x[1, p] … x[K, p]
    squared norms     n[k] = Σ_p (x[k, p] − c[p])²
    Gram matrix       G[j, k] = Σ_p (x[j, p] − c[p]) · (x[k, p] − c[p])
    shifted mean      out[p] = c[p] + Σ_k share[k] · (x[k, p] − c[p]) + std · normal(seed, p)
    quantisation      scale = max|block| / 127, int8 = round(x / scale)

In the means one program owns one block of `out`, so one launch covers all layers; a block lies inside one layer
and reads its share once per client. Sums over P leave one partial result per program, to be added in a fixed order.
There are no atomics: the same input gives the same bits.

Block values are `b_*`, offsets `o_*`, masks `m_*`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _is_infinite(b_x):
    """Whether each element is NaN or infinite."""
    return ~(tl.abs(b_x) < float("inf"))


@triton.jit
def _client_block(
    uploads_ptr, scales_ptr, row_stride, client, clients, block, blocks, o_p, m_p,
    SCALED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One client's block [BLOCK] in the accumulation type, dequantised if SCALED; any client ≥ K reads the last."""
    client = tl.minimum(client, clients - 1)
    b_x = tl.load(uploads_ptr + client.to(tl.int64) * row_stride + o_p, mask=m_p, other=0).to(ACC)
    if SCALED:
        b_x = b_x * tl.load(scales_ptr + client * blocks + block)
    return b_x


@triton.jit(do_not_specialize=["clients", "numel", "blocks"])
def aggregate_rows(
    uploads_ptr, scales_ptr, shares_ptr, block_layer_ptr, out_ptr, nonfinite_ptr,
    row_stride, clients, numel, blocks, layers,
    PER_LAYER: tl.constexpr, SCALED: tl.constexpr, NONFINITE: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [P] from the rows of uploads [K, P]; shares [K, layers] (layers = 1 without PER_LAYER).

    Grid: (blocks,) = (cdiv(P, BLOCK),). `block_layer` [blocks] names each block's layer; `scales` [K, blocks].
    `nonfinite` [K] receives True for a client with NaN or Inf: 0 · NaN is NaN, so a finite sum proves its terms
    finite, and only a block whose sum is not is read again. Every program stores the same True.
    """
    block = tl.program_id(0)
    o_p = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < numel
    layer = tl.load(block_layer_ptr + block) if PER_LAYER else 0
    b_sum = tl.zeros([BLOCK], dtype=ACC)
    for first in range(0, clients, UNROLL):
        for step in tl.static_range(UNROLL):  # independent loads, all in flight before the first sum
            client = first + step
            m_client = client < clients
            share = tl.load(shares_ptr + client * layers + layer, mask=m_client, other=0.0)
            b_x = _client_block(
                uploads_ptr, scales_ptr, row_stride, client, clients, block, blocks, o_p, m_p, SCALED, ACC
            )
            b_sum += tl.where(m_client, share * b_x, 0.0)
    tl.store(out_ptr + o_p, b_sum.to(out_ptr.dtype.element_ty), mask=m_p)
    if NONFINITE and tl.max(_is_infinite(b_sum).to(tl.int32), 0) > 0:
        for client in range(clients):
            b_x = _client_block(
                uploads_ptr, scales_ptr, row_stride, client, clients, block, blocks, o_p, m_p, SCALED, ACC
            )
            found = tl.max(_is_infinite(b_x).to(tl.int32), 0) > 0
            tl.store(nonfinite_ptr + client, found, mask=found)


@triton.jit
def _table_block(address_ptr, dtype_ptr, entry, o_p, m_p, ALIGNED: tl.constexpr, ACC: tl.constexpr):
    """The elements o_p [BLOCK] of the tensor whose address is entry `entry` of the table."""
    row = tl.load(address_ptr + entry).to(dtype_ptr.dtype)
    if ALIGNED:
        row = tl.multiple_of(row, 16)
    return tl.load(row + o_p, mask=m_p, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["clients", "tensors"])
def aggregate_tables(
    address_ptr, shares_ptr, block_tensor_ptr, block_start_ptr, numel_ptr, out_address_ptr, dtype_ptr,
    nonfinite_ptr, clients, tensors,
    ALIGNED: tl.constexpr, NONFINITE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The same over separate tensors: address [K, T] and out_address [T] hold the tensors' addresses.

    Grid: (blocks,). Block b is elements block_start[b]… of tensor block_tensor[b], which has numel[t] elements.
    shares: [K, T]. dtype_ptr is never read; it carries the storage type.
    """
    block = tl.program_id(0)
    tensor = tl.load(block_tensor_ptr + block)
    o_p = tl.load(block_start_ptr + block) + tl.arange(0, BLOCK)
    m_p = o_p < tl.load(numel_ptr + tensor)
    b_sum = tl.zeros([BLOCK], dtype=ACC)
    for first in range(0, clients, UNROLL):
        for step in tl.static_range(UNROLL):
            client = first + step
            m_client = client < clients
            entry = tl.minimum(client, clients - 1) * tensors + tensor
            share = tl.load(shares_ptr + entry, mask=m_client, other=0.0)
            b_x = _table_block(address_ptr, dtype_ptr, entry, o_p, m_p, ALIGNED, ACC)
            b_sum += tl.where(m_client, share * b_x, 0.0)
    out = tl.load(out_address_ptr + tensor).to(dtype_ptr.dtype)
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    tl.store(out + o_p, b_sum.to(dtype_ptr.dtype.element_ty), mask=m_p)
    if NONFINITE and tl.max(_is_infinite(b_sum).to(tl.int32), 0) > 0:
        for client in range(clients):
            b_x = _table_block(address_ptr, dtype_ptr, client * tensors + tensor, o_p, m_p, ALIGNED, ACC)
            found = tl.max(_is_infinite(b_x).to(tl.int32), 0) > 0
            tl.store(nonfinite_ptr + client, found, mask=found)


@triton.jit(do_not_specialize=["clients", "numel", "trim"])
def trimmed_mean_network(
    uploads_ptr, out_ptr, row_stride, clients, numel, trim,
    PAIRS: tl.constexpr, CLIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [P] for K ≤ CLIENTS: a sorting network over the clients, whose rows all lie in registers.

    Grid: (cdiv(P, BLOCK),). PAIRS lists the network's comparators (`network.py`). Missing clients are +Inf, last in
    the order. Minimum and maximum propagate NaN and every output depends on every input: a NaN reaches all ranks.
    """
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < numel
    rows = ()  # CLIENTS blocks [BLOCK], a thread holds the same coordinates of each
    for k in tl.static_range(CLIENTS):
        row = uploads_ptr + tl.minimum(k, clients - 1).to(tl.int64) * row_stride
        b_x = tl.load(row + o_p, mask=m_p, other=0.0).to(tl.float32)
        rows = rows + (tl.where(k < clients, b_x, float("inf")),)  # noqa: RUF005  (no unpacking in Triton)
    for n in tl.static_range(len(PAIRS)):
        b_low = tl.minimum(rows[PAIRS[n][0]], rows[PAIRS[n][1]], propagate_nan=tl.PropagateNan.ALL)
        b_high = tl.maximum(rows[PAIRS[n][0]], rows[PAIRS[n][1]], propagate_nan=tl.PropagateNan.ALL)
        rows = rows[: PAIRS[n][0]] + (b_low,) + rows[PAIRS[n][0] + 1 :]  # noqa: RUF005
        rows = rows[: PAIRS[n][1]] + (b_high,) + rows[PAIRS[n][1] + 1 :]  # noqa: RUF005
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(CLIENTS):
        b_sum += tl.where((k >= trim) & (k < clients - trim), rows[k], 0.0)
    b_mean = b_sum / (clients - 2 * trim).to(tl.float32)
    tl.store(out_ptr + o_p, b_mean.to(out_ptr.dtype.element_ty), mask=m_p)


@triton.jit(do_not_specialize=["clients", "numel", "trim"])
def trimmed_mean_sort(
    uploads_ptr, out_ptr, row_stride, clients, numel, trim,
    CLIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for many clients, whose network would take minutes to compile: tl.sort of a tile [BLOCK, CLIENTS].

    Grid: (cdiv(P, BLOCK),).
    """
    o_k = tl.arange(0, CLIENTS)[None, :]
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < numel
    m_x = m_p[:, None] & (o_k < clients)
    b_x = tl.load(uploads_ptr + o_k.to(tl.int64) * row_stride + o_p[:, None], mask=m_x, other=float("inf"))
    b_x = b_x.to(tl.float32)  # [BLOCK, CLIENTS]
    m_kept = (o_k >= trim) & (o_k < clients - trim)
    b_sum = tl.sum(tl.where(m_kept, tl.sort(b_x, 1), 0.0), 1)
    b_nan = tl.max((b_x != b_x).to(tl.int32), 1)  # sorting has no place for NaN
    b_mean = tl.where(b_nan > 0, float("nan"), b_sum / (clients - 2 * trim).to(tl.float32))
    tl.store(out_ptr + o_p, b_mean.to(out_ptr.dtype.element_ty), mask=m_p)


@triton.jit(do_not_specialize=["clients", "numel"])
def squared_norms(
    uploads_ptr, center_ptr, partial_ptr, row_stride, clients, numel,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """partial [spans, K]: the squared norm of each update over each span of SPAN elements.

    Grid: (K, cdiv(P, SPAN)): the clients of one span run together, so that its `center` is read from memory once.
    """
    client, span = tl.program_id(0), tl.program_id(1)
    row = uploads_ptr + client.to(tl.int64) * row_stride
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, SPAN, BLOCK):
        o_p = span.to(tl.int64) * SPAN + first + tl.arange(0, BLOCK)
        m_p = o_p < numel
        b_d = tl.load(row + o_p, mask=m_p, other=0.0).to(tl.float32)  # [BLOCK]
        b_d -= tl.load(center_ptr + o_p, mask=m_p, other=0.0).to(tl.float32)
        b_sum += b_d * b_d
    tl.store(partial_ptr + span * clients + client, tl.sum(b_sum, 0))


@triton.jit(do_not_specialize=["clients", "numel"])
def gram(
    uploads_ptr, center_ptr, partial_ptr, row_stride, clients, numel,
    CLIENTS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """partial [spans, K, K]: the updates' Gram matrix over each span of SPAN elements, in full float32.

    Grid: (cdiv(P, SPAN),).
    """
    span = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, CLIENTS)
    m_k = o_k < clients
    b_gram = tl.zeros([CLIENTS, CLIENTS], dtype=tl.float32)
    for first in range(0, SPAN, BLOCK):
        o_p = span * SPAN + first + tl.arange(0, BLOCK)
        m_x = m_k[:, None] & (o_p < numel)[None, :]
        b_c = tl.load(center_ptr + o_p, mask=o_p < numel, other=0.0).to(tl.float32)
        b_x = tl.load(uploads_ptr + o_k[:, None].to(tl.int64) * row_stride + o_p[None, :], mask=m_x, other=0.0)
        b_d = tl.where(m_x, b_x.to(tl.float32) - b_c[None, :], 0.0)  # [CLIENTS, BLOCK]
        b_gram = tl.dot(b_d, tl.trans(b_d), b_gram, input_precision="ieee")
    o_gram = (span * clients + o_k[:, None]) * clients + o_k[None, :]
    tl.store(partial_ptr + o_gram, b_gram, mask=m_k[:, None] & m_k[None, :])


@triton.jit
def _normal(seed, o_p):
    """Standard normal noise that depends on (seed, p) alone: Philox and the Box-Muller transform.

    cos 2πu = 2 sin² π(u − ½) − 1, the sine by its series up to x¹¹ (error below 6e-8): the library's cosine takes
    arguments of any size, and stack memory for that.
    """
    b_u, b_v, _, _ = tl.rand4x(seed, o_p)
    b_x = 3.141592653589793 * (b_v - 0.5)
    b_y = b_x * b_x
    b_sine = 1 / 362880 - b_y / 39916800
    b_sine = 1 / 120 - b_y * (1 / 5040 - b_y * b_sine)
    b_sine = b_x * (1 - b_y * (1 / 6 - b_y * b_sine))
    return tl.sqrt(-2 * tl.log(tl.maximum(b_u, 1e-10))) * (2 * b_sine * b_sine - 1)


@triton.jit(do_not_specialize=["clients", "numel", "seed"])
def shifted_mean(
    uploads_ptr, center_ptr, shares_ptr, out_ptr, row_stride, clients, numel, std, seed: tl.int64,
    NOISE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out [P] from uploads [K, P], center [P] and shares [K], which need not sum to 1.

    Grid: (cdiv(P, BLOCK),). NOISE adds normal noise that depends on (seed, p) alone.
    """
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < numel
    b_c = tl.load(center_ptr + o_p, mask=m_p, other=0.0).to(tl.float32)  # [BLOCK]
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, clients, UNROLL):
        for step in tl.static_range(UNROLL):
            client = first + step
            m_client = client < clients
            share = tl.load(shares_ptr + client, mask=m_client, other=0.0)
            row = uploads_ptr + tl.minimum(client, clients - 1).to(tl.int64) * row_stride
            b_x = tl.load(row + o_p, mask=m_p, other=0.0).to(tl.float32)  # [BLOCK]
            b_sum += tl.where(m_client, share * (b_x - b_c), 0.0)
    b_out = b_c + b_sum
    if NOISE:
        b_out += std * _normal(seed, o_p)
    tl.store(out_ptr + o_p, b_out.to(out_ptr.dtype.element_ty), mask=m_p)


@triton.jit(do_not_specialize=["numel"])
def quantize(x_ptr, values_ptr, scales_ptr, numel, BLOCK: tl.constexpr):
    """values int8 [P] and scales [blocks] of x [P]; a block with NaN or Inf gets a scale of NaN.

    Grid: (cdiv(P, BLOCK),).
    """
    block = tl.program_id(0)
    o_p = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < numel
    b_x = tl.load(x_ptr + o_p, mask=m_p, other=0.0).to(tl.float32)  # [BLOCK]
    m_bad = _is_infinite(b_x)
    bad = tl.max(m_bad.to(tl.int32), 0) > 0
    largest = tl.max(tl.where(m_bad, 0.0, tl.abs(b_x)), 0)
    scale = tl.maximum(largest / 127.0, 1.1754943508222875e-38)  # the smallest normal float32; a block may be zero
    b_q = tl.where(m_bad, 0.0, b_x) / scale
    b_q = (b_q + 12582912.0) - 12582912.0  # to the nearest integer: 1.5 · 2^23 leaves no bit for a fraction
    tl.store(values_ptr + o_p, b_q.to(tl.int8), mask=m_p)
    tl.store(scales_ptr + block, tl.where(bad, float("nan"), scale))
