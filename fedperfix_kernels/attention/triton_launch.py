"""Allocates what the Triton kernels write and launches them."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedperfix_kernels.attention.configs import (
    BACKWARD_BIAS,
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    BACKWARD_WHOLE,
    FORWARD,
    HALF,
    IEEE,
    TF32,
    WITH_OPTIONS,
    LaunchConfig,
    architecture,
    key_block,
    launch_config,
    padded_head_dim,
    row_blocks,
)
from fedperfix_kernels.attention.inputs import Inputs, branches, token_strides
from fedperfix_kernels.attention.kernels.forward import attention_forward
from fedperfix_kernels.attention.kernels.split_backward import (
    attention_backward_bias,
    attention_backward_keys,
    attention_backward_queries,
)
from fedperfix_kernels.attention.kernels.whole_backward import attention_backward_whole

# Programs that share a prefix's (or a bias's) gradient sum their images one after the other; this many programs
# fill a large GPU, and each group of images costs one float32 copy of that gradient.
_TARGET_PROGRAMS = 1024


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Prefix attention.

    Returns:
        out [B, N, H, D] contiguous, and the base-2 log-sum-exps [branches, B, H, N]: base and prefix in
        `gated`, one joint row otherwise.
    """
    q = inputs.q
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((branches(inputs.mode), batch, heads, tokens), dtype=inputs.gate.dtype, device=q.device)
    config = _config(FORWARD, inputs)
    with torch.cuda.device_of(q):
        attention_forward[batch * heads, triton.cdiv(tokens, config.block_m)](
            q, inputs.k, inputs.v, inputs.prefix_k, inputs.prefix_v, inputs.gate, *inputs.optional(), out, lse,
            *inputs.strides(), heads, tokens, inputs.prefix_len, inputs.bias_groups, inputs.scale,
            MODE=inputs.mode, **inputs.features(), **_key_blocks(inputs, config),
            **_constants(q, config), BLOCK_N=config.block_n,
        )  # fmt: skip
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
    q = inputs.q
    batch, tokens, heads, head_dim = q.shape
    dqkv = torch.empty((batch, tokens, 3, heads, head_dim), dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        config = _config(BACKWARD_WHOLE, inputs)
        if config is not None and need_prefix and not any(inputs.features().values()):
            dprefix, dgate = _whole(dout, inputs, out, lse, dqkv, config)
            dbias = inputs.gate.new_empty(0)
        else:
            dprefix, dgate, dbias = _split(dout, inputs, out, lse, dqkv, need_prefix, need_bias)
    return dqkv, dprefix, dgate, dbias


def _whole(
    dout: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, dqkv: Tensor, config: LaunchConfig
) -> tuple[Tensor, Tensor]:
    """One kernel for everything; a shared prefix's gradient is summed over the images afterwards."""
    q = inputs.q
    batch, tokens, heads, _ = q.shape
    dprefix = _empty_prefix(inputs, batch)
    dgate = torch.empty((batch, heads), dtype=inputs.gate.dtype, device=q.device)
    width = padded_head_dim(q.shape[3])
    two_branches = inputs.mode != "additive" and inputs.prefix_len > 0
    partial = torch.empty(batch * heads * tokens * width if two_branches else 0, dtype=lse.dtype, device=q.device)
    attention_backward_whole[(batch * heads,)](
        q, inputs.k, inputs.v, inputs.prefix_k, inputs.prefix_v, inputs.gate, out, dout, lse,
        *dqkv.unbind(2), *dprefix.unbind(2), dgate, partial,
        *inputs.strides()[:15], *token_strides(dout), *dqkv.stride()[:2], dqkv.stride(3),
        *dprefix.stride()[:2], dprefix.stride(3),
        heads, tokens, inputs.prefix_len, inputs.scale,
        MODE=inputs.mode, BLOCK_N=key_block(tokens), BLOCK_L=key_block(inputs.prefix_len) if two_branches else 0,
        **_query_blocks(tokens, config), **_constants(q, config),
    )  # fmt: skip
    if inputs.shared:
        dprefix = dprefix.sum(0, keepdim=True).to(q.dtype)
    return dprefix, dgate.sum(0)


def _split(
    dout: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, dqkv: Tensor, need_prefix: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dprefix, dgate, dbias; dqkv is written."""
    q, gate = inputs.q, inputs.gate
    batch, _, heads, head_dim = q.shape
    dq, dk, dv = dqkv.unbind(2)
    delta = torch.empty_like(lse)
    _launch_queries(dout, inputs, out, lse, delta, dq)
    dprefix, dgate = q.new_empty((0, 0, 2, heads, head_dim)), gate.new_empty(0)
    if inputs.mode == "additive":
        per_image = _empty_prefix(inputs, batch)
        partial_gate = _launch_keys(dout, inputs, lse[0], delta[0], dk, dv, "additive", dprefix=per_image)
        if need_prefix:
            dprefix = _of_prefix(inputs, per_image).to(q.dtype)
            dgate = _of_gate(inputs, partial_gate.sum(2))
    else:
        _launch_keys(dout, inputs, lse[0], delta[0], dk, dv, "base")
        if need_prefix:
            dprefix, dgate = _prefix_gradient(dout, inputs, lse, delta)
    dbias = _bias_gradient(dout, inputs, lse, delta) if need_bias else gate.new_empty(0)
    return dprefix, dgate, dbias


def _prefix_gradient(dout: Tensor, inputs: Inputs, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """dprefix [B, 1 or T, L, 2, H, D] and dgate; a shared prefix is summed in two stages of fixed order."""
    q = inputs.q
    batch, _, heads, _ = q.shape
    config = _config(BACKWARD_KEYS, inputs)
    per_program = 1
    if inputs.shared:
        programs = heads * max(1, triton.cdiv(inputs.prefix_len, config.block_n))
        per_program = triton.cdiv(batch, max(1, min(batch, _TARGET_PROGRAMS // programs)))
    groups = inputs.prefix_k.shape[0] if inputs.prefix_index is not None else triton.cdiv(batch, per_program)
    dprefix = _empty_prefix(inputs, groups)
    # The keys of this launch are the prefix's; they have neither bias nor mask.
    prefix = replace(inputs, k=inputs.prefix_k, v=inputs.prefix_v, bias=None, key_mask=None)
    dgate = _launch_keys(
        dout, prefix, lse[-1], delta[-1], *dprefix.unbind(2), inputs.mode, batch_per_program=per_program
    )
    dgate = dgate.sum(2)  # [groups, H]
    if inputs.gate.dim() == 1:
        dgate = dgate.sum(0)
    return (dprefix.sum(0, keepdim=True).to(q.dtype) if inputs.shared else dprefix), dgate


def _of_prefix(inputs: Inputs, per_image: Tensor) -> Tensor:
    """The gradient of the prefix as it was given, from one gradient per image."""
    if inputs.prefix_index is not None:
        return _sum_by_client(inputs, per_image)
    return per_image.sum(0, keepdim=True) if inputs.shared else per_image


def _of_gate(inputs: Inputs, per_image: Tensor) -> Tensor:
    """The gradient of the gate as it was given, from [B, H]."""
    return _sum_by_client(inputs, per_image) if inputs.gate.dim() == 2 else per_image.sum(0)


def _sum_by_client(inputs: Inputs, per_image: Tensor) -> Tensor:
    """[T, ...] from [B, ...] as a product with the one-hot index: a fixed order, unlike index_add on a GPU."""
    clients = torch.arange(inputs.prefix_k.shape[0], device=per_image.device)
    chosen = (clients[:, None] == inputs.prefix_index[None, :]).to(per_image.dtype)
    return (chosen @ per_image.flatten(1)).view(len(clients), *per_image.shape[1:])


def _launch_queries(dout: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor) -> None:
    """Write dq and delta."""
    batch, tokens, heads, _ = inputs.q.shape
    config = _config(BACKWARD_QUERIES, inputs)
    attention_backward_queries[batch * heads, triton.cdiv(tokens, config.block_m)](
        inputs.q, inputs.k, inputs.v, inputs.prefix_k, inputs.prefix_v, inputs.gate, *inputs.optional(),
        out, dout, lse, dq, delta,
        *inputs.strides(), *token_strides(dout), *token_strides(dq),
        heads, tokens, inputs.prefix_len, inputs.bias_groups, inputs.scale,
        MODE=inputs.mode, **inputs.features(), **_key_blocks(inputs, config),
        **_constants(inputs.q, config), BLOCK_N=config.block_n,
    )  # fmt: skip


def _launch_keys(
    dout: Tensor,
    inputs: Inputs,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    branch: str,
    *,
    dprefix: Tensor | None = None,
    batch_per_program: int = 1,
) -> Tensor:
    """Write dk, dv (and dprefix in `additive`); return the gate's partial sums [groups, H, blocks]."""
    q = inputs.q
    batch, tokens, heads, _ = q.shape
    length = inputs.k.shape[1]
    config = _config(BACKWARD_KEYS, inputs)
    blocks = triton.cdiv(length, config.block_n)
    by_client = inputs.prefix_index is not None and branch in ("gated", "concat")
    groups = inputs.k.shape[0] if by_client else triton.cdiv(batch, batch_per_program)
    order = bounds = q  # not read
    strides = inputs.strides()
    if by_client:
        order, bounds = _images_by_client(inputs.prefix_index, groups)
    elif inputs.prefix_index is not None and branch == "additive":
        inputs = _gathered(inputs)
        strides = inputs.strides()
    elif inputs.prefix_index is not None:
        strides = (*strides[:15], 0, *strides[16:])  # `base` has no gate: do not look one up by image
    dgate = torch.empty((groups, heads, blocks), dtype=inputs.gate.dtype, device=q.device)
    if blocks == 0:  # an empty prefix: nothing to write
        return dgate
    dprefix_k, dprefix_v = (dk, dv) if dprefix is None else dprefix.unbind(2)
    bias, key_mask, _ = inputs.optional()
    attention_backward_keys[groups * heads, blocks](
        q, inputs.k, inputs.v, inputs.prefix_k, inputs.prefix_v, inputs.gate, bias, key_mask, order, bounds,
        dout, lse, delta, dk, dv, dprefix_k, dprefix_v, dgate,
        *strides, *token_strides(dout), *token_strides(dk), *token_strides(dprefix_k),
        batch, batch_per_program, heads, tokens, length, inputs.bias_groups, inputs.scale,
        BRANCH=branch, BIAS=inputs.bias is not None, MASK=inputs.key_mask is not None, INDEXED=by_client,
        **_query_blocks(tokens, config), **_constants(q, config), BLOCK_N=config.block_n,
    )  # fmt: skip
    return dgate


def _bias_gradient(dout: Tensor, inputs: Inputs, lse: Tensor, delta: Tensor) -> Tensor:
    """[G, H, N, N] in the accumulation type, summed over images in two stages of fixed order."""
    batch, tokens, heads, _ = inputs.q.shape
    config = _config(BACKWARD_BIAS, inputs)
    groups = inputs.bias_groups
    images = batch // groups
    blocks = triton.cdiv(tokens, config.block_m), triton.cdiv(tokens, config.block_n)
    programs = groups * heads * blocks[0] * blocks[1]
    per_program = triton.cdiv(images, max(1, min(images, _TARGET_PROGRAMS // programs)))
    parts = triton.cdiv(images, per_program)
    dbias = torch.empty((parts, groups, heads, tokens, tokens), dtype=lse.dtype, device=lse.device)
    features = inputs.features()
    features.pop("BIAS")
    attention_backward_bias[parts * groups * heads, blocks[0], blocks[1]](
        inputs.q, inputs.k, inputs.v, inputs.prefix_k, inputs.prefix_v, inputs.gate, *inputs.optional(),
        dout, lse[0], delta[0], dbias,
        *inputs.strides(), *token_strides(dout),
        images, per_program, heads, tokens, groups, inputs.scale,
        ADD=inputs.mode == "additive", **features, **_constants(inputs.q, config), BLOCK_N=config.block_n,
    )  # fmt: skip
    return dbias.sum(0)


def _images_by_client(prefix_index: Tensor, clients: int) -> tuple[Tensor, Tensor]:
    """(order [B], bounds [T + 1]): client t's images are order[bounds[t]:bounds[t + 1]], in ascending order."""
    ordered, order = torch.sort(prefix_index, stable=True)
    every = torch.arange(clients + 1, device=prefix_index.device, dtype=prefix_index.dtype)
    return order, torch.searchsorted(ordered, every)


def _gathered(inputs: Inputs) -> Inputs:
    """The same with a prefix (and gate) of each image's own, for the kernel that has no use for an index."""
    index = inputs.prefix_index.long()
    gate = inputs.gate[index] if inputs.gate.dim() == 2 else inputs.gate
    pair = inputs.prefix_k[index], inputs.prefix_v[index]
    return replace(inputs, prefix_k=pair[0], prefix_v=pair[1], gate=gate, prefix_index=None)


def _empty_prefix(inputs: Inputs, groups: int) -> Tensor:
    """[groups, L, 2, H, D] to write gradients into; float32 where they are summed afterwards."""
    q = inputs.q
    summed = inputs.shared or (inputs.prefix_index is not None and inputs.mode == "additive")
    dtype = inputs.gate.dtype if summed else q.dtype
    return torch.empty((groups, inputs.prefix_len, 2, q.shape[2], q.shape[3]), dtype=dtype, device=q.device)


def _key_blocks(inputs: Inputs, config: LaunchConfig) -> dict[str, int]:
    """How the kernels that loop over keys walk those of the two branches."""
    loop, tail = row_blocks(inputs.q.shape[1], config.block_n, config.tails)
    prefix_loop, prefix_tail = row_blocks(inputs.prefix_len, config.block_n, config.tails)
    return {"LOOP": loop, "TAIL": tail, "PREFIX_LOOP": prefix_loop, "PREFIX_TAIL": prefix_tail}


def _query_blocks(tokens: int, config: LaunchConfig) -> dict[str, int]:
    """The same for the kernels that loop over queries."""
    loop, tail = row_blocks(tokens, config.block_m, config.tails)
    return {"LOOP": loop, "TAIL": tail}


def _config(kernel: str, inputs: Inputs) -> LaunchConfig | None:
    q = inputs.q
    options = inputs.bias is not None or inputs.key_mask is not None
    if options and kernel in (FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS):
        kernel += WITH_OPTIONS
    longest = max(q.shape[1], inputs.prefix_len)
    return launch_config(kernel, _products(q), q.shape[3], longest, architecture(q.device))


def _constants(q: Tensor, config: LaunchConfig) -> dict[str, object]:
    return {
        "D": q.shape[3],
        "BLOCK_M": config.block_m,
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
