"""Prefix attention, forward and forward + backward: eager, composed of SDPA, compiled, fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.comparison import Comparison, Plan, Results
from fedperfix_kernels import backends, packed_prefix_attention


@dataclass(frozen=True)
class Shape:
    """One size of the attention of a ViT; `prefix_len` None is the adapter's one key per token."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    prefix_len: int | None = None

    def __str__(self) -> str:
        prefix = "adapter" if self.prefix_len is None else f"{self.prefix_len} shared tokens"
        return f"B={self.batch} H={self.heads} N={self.tokens} D={self.head_dim}, {prefix}"


GPU_SHAPES = [
    Shape(batch, heads, tokens, 64, prefix_len)
    for batch, heads, tokens in ((64, 6, 197), (64, 12, 197), (256, 3, 65), (32, 16, 257), (16, 12, 577))
    for prefix_len in (None, 10)
]
CPU_SHAPES = [Shape(32, 3, 50, 32), Shape(8, 6, 197, 64), Shape(8, 6, 197, 64, 10)]


def attention_plans(device: torch.device) -> Iterator[Plan]:
    """Every mode at the first size, `gated` at all, in the precisions that the device is used with."""
    on_gpu = device.type == "cuda"
    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        for shape in shapes:
            for mode in ("gated", "concat", "additive") if shape == shapes[0] else ("gated",):
                for backward in (False, True):
                    kind = "forward + backward" if backward else "forward"
                    name = f"attention {mode} {kind}, {str(dtype).removeprefix('torch.')}, {shape}"
                    build = partial(_comparison, name, shape, mode, dtype, device, backward)
                    yield Plan(name, tuple(_functions(mode, device)), build)


def _comparison(
    name: str, shape: Shape, mode: str, dtype: torch.dtype, device: torch.device, backward: bool
) -> Comparison:
    tokens = shape.batch * shape.tokens * shape.heads * shape.head_dim
    length = shape.tokens if shape.prefix_len is None else shape.prefix_len
    prefix_batch = shape.batch if shape.prefix_len is None else 1
    prefix = prefix_batch * length * shape.heads * shape.head_dim
    size = torch.finfo(dtype).bits // 8
    keys = length if mode == "additive" else shape.tokens + length
    products = 2 * shape.batch * shape.heads * shape.tokens * keys * shape.head_dim
    # Forward reads q, k, v, p_k, p_v and writes out; backward reads these and dout and writes five gradients.
    moved = (4 * tokens + 2 * prefix) * size
    if backward:
        moved += (7 * tokens + 4 * prefix) * size
    sets = _input_sets(moved, device)
    inputs = [_inputs(shape, prefix_batch, length, dtype, device, seed, backward) for seed in range(sets)]

    def run(function: Callable[..., Tensor]) -> Callable[[int], Results]:
        def call(index: int) -> Results:
            *leaves, dout = inputs[index]
            if not backward:
                with torch.no_grad():
                    return (function(*leaves),)
            out = function(*leaves)
            return out, *torch.autograd.grad(out, leaves, dout)

        return call

    def exact() -> Results:
        *leaves, dout = (x.detach().double().requires_grad_(backward) for x in inputs[0])
        out = packed_prefix_attention(*leaves, mode=mode, backend="reference")
        return (out, *torch.autograd.grad(out, leaves, dout.detach())) if backward else (out,)

    return Comparison(
        name=name,
        variants={name: run(function) for name, function in _functions(mode, device).items()},
        input_sets=sets,
        exact=exact,
        work=shape.batch,
        unit="images",
        dtype=dtype,
        bytes_moved=moved,
        flops=products * (7 if backward else 2),
        settings=vars(shape) | {"mode": mode, "dtype": str(dtype), "backward": backward},
    )


def _functions(mode: str, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    def backend(name: str) -> Callable[..., Tensor]:
        def function(qkv: Tensor, prefix: Tensor, gate: Tensor) -> Tensor:
            return packed_prefix_attention(qkv, prefix, gate, mode=mode, backend=name)

        return function

    functions = {
        "eager": backend("reference"),
        "SDPA": backend("torch"),
        "compiled eager": torch.compile(backend("reference"), dynamic=False),
        "compiled SDPA": torch.compile(backend("torch"), dynamic=False),
    }
    if backends.resolve("auto", device) == "triton":
        functions["fused"] = backend("triton")
    return functions


def _inputs(
    shape: Shape, prefix_batch: int, length: int, dtype: torch.dtype, device: torch.device, seed: int, grad: bool
) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    qkv = normal(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
    prefix = normal(prefix_batch, length, 2, shape.heads, shape.head_dim)
    gate = torch.rand(shape.heads, generator=generator, device=device) + 0.5
    dout = normal(shape.batch, shape.tokens, shape.heads, shape.head_dim)
    return *(x.requires_grad_(grad) for x in (qkv, prefix, gate)), dout


def _input_sets(bytes_moved: int, device: torch.device) -> int:
    """Enough sets that one round over them moves twice the second-level cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(16, -(-2 * cache // bytes_moved)))
