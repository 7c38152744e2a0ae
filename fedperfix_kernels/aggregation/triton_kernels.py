"""Triton kernels of the weighted mean over clients: every element is read once and written once.

    out[p] = Σ_k share[k, layer(p)] · x[k, p]        accumulated in float32, clients in order

One program owns one block of `out`, so one launch covers all layers; a block lies inside one layer and reads its
share once per client. There are no atomics: the same input gives the same bits.

Block values are `b_*`, offsets `o_*`, masks `m_*`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["clients", "numel"])
def aggregate_rows(
    uploads_ptr, shares_ptr, block_layer_ptr, out_ptr,
    row_stride, clients, numel, layers,
    PER_LAYER: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [P] from the rows of uploads [K, P]; shares [K, layers] (layers = 1 without PER_LAYER).

    Grid: (cdiv(P, BLOCK),). `block_layer` [cdiv(P, BLOCK)] names each block's layer.
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
            row = uploads_ptr + tl.minimum(client, clients - 1).to(tl.int64) * row_stride
            b_x = tl.load(row + o_p, mask=m_p, other=0.0)  # [BLOCK]
            b_sum += tl.where(m_client, share * b_x.to(ACC), 0.0)
    tl.store(out_ptr + o_p, b_sum.to(out_ptr.dtype.element_ty), mask=m_p)


@triton.jit(do_not_specialize=["clients", "tensors"])
def aggregate_tables(
    address_ptr, shares_ptr, block_tensor_ptr, block_start_ptr, numel_ptr, out_address_ptr, dtype_ptr,
    clients, tensors,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr,
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
            row = tl.load(address_ptr + entry).to(dtype_ptr.dtype)
            if ALIGNED:
                row = tl.multiple_of(row, 16)
            b_x = tl.load(row + o_p, mask=m_p, other=0.0)  # [BLOCK]
            b_sum += tl.where(m_client, share * b_x.to(ACC), 0.0)
    out = tl.load(out_address_ptr + tensor).to(dtype_ptr.dtype)
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    tl.store(out + o_p, b_sum.to(dtype_ptr.dtype.element_ty), mask=m_p)
