"""Prefix attention, forward, backward and both: eager, SDPA by backend, compiled, FlexAttention, fused.

On a CPU `SDPA` is the library's composition of PyTorch's operations, and forward and backward are also timed on one
thread, as a client that has one core computes.

Compiled graphs on a GPU, counted from the plans: 12 cases (five sizes with two prefixes each, two more modes at the
first). A case trains under torch.compile as `compiled eager`, four `compiled SDPA` and `FlexAttention`, a forward
and a backward graph each, and infers as `compiled eager` and `compiled SDPA`: 14 graphs, 168 in all. To keep it
there, `backward` alone times no compiled variant (torch.compile frees what a second backward pass would need), and
`forward` alone, where no target names one, only those two.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from bench.comparison import Comparison, Plan, Results, Unavailable, compiled
from fedperfix_kernels import backends, packed_prefix_attention
from fedperfix_kernels.attention.api import FUSED

Function = Callable[[Tensor, Tensor, Tensor], Tensor]  # qkv [B, N, 3, H, D], prefix [B or 1, L, 2, H, D], gate [H]

KINDS = ("forward", "backward", "forward + backward")
# Products per key of a branch: scores and output; scores again and the gradients of v, weights, q and k.
_PRODUCTS = {"forward": 2, "backward": 5, "forward + backward": 7}
_KERNELS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
_REFUSAL = re.compile(r"(No available kernel|No viable backend|cuDNN Frontend error)[^'\"\n]*")


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

    def prefix_size(self) -> tuple[int, int]:
        """Batch and length of the prefix: (B, N) of the adapter, (1, L) of shared tokens."""
        return (self.batch, self.tokens) if self.prefix_len is None else (1, self.prefix_len)


GPU_SHAPES = [
    Shape(batch, heads, tokens, 64, prefix_len)
    for batch, heads, tokens in ((64, 6, 197), (64, 12, 197), (256, 3, 65), (32, 16, 257), (16, 12, 577))
    for prefix_len in (None, 10)
]
CPU_SHAPES = [
    Shape(32, 3, 50, 32),
    Shape(16, 3, 65, 64),
    Shape(8, 6, 197, 64),
    Shape(8, 6, 197, 64, 10),
    Shape(4, 6, 257, 64),
]
# Compiling takes most of a record's time on a CPU: there two sizes are compiled, for training alone.
_CPU_COMPILED = CPU_SHAPES[0], CPU_SHAPES[2]


def attention_plans(device: torch.device) -> Iterator[Plan]:
    """Every mode at the first size, `gated` at all, in the precisions that the device is used with."""
    on_gpu = device.type == "cuda"
    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        for shape in shapes:
            for mode in ("gated", "concat", "additive") if shape == shapes[0] else ("gated",):
                for kind in KINDS:
                    name = f"attention {mode} {kind}, {str(dtype).removeprefix('torch.')}, {shape}"
                    build = partial(_comparison, name, shape, mode, dtype, device, kind)
                    yield Plan(name, tuple(_functions(shape, mode, device, kind)), build)
            if not on_gpu:
                yield _on_one_thread(shape, dtype, device)


def _on_one_thread(shape: Shape, dtype: torch.dtype, device: torch.device) -> Plan:
    """`gated` forward + backward on one thread, without compiled variants; ceilings are those of all threads."""
    kind = KINDS[-1]
    name = f"attention gated {kind} on one thread, {str(dtype).removeprefix('torch.')}, {shape}"

    def build() -> Comparison:
        comparison = _comparison(name, shape, "gated", dtype, device, kind)
        variants = {name: _alone(comparison.variants[name]) for name in plain}
        settings = comparison.settings | {"threads": 1}
        return replace(comparison, variants=variants, bytes_moved=0.0, flops=0.0, settings=settings)

    plain = [x for x in _functions(shape, "gated", device, kind) if not x.startswith("compiled")]
    return Plan(name, tuple(plain), build)


def _alone(variant: Callable[[int], Results]) -> Callable[[int], Results]:
    def run(index: int) -> Results:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return variant(index)
        finally:
            torch.set_num_threads(before)

    return run


def _comparison(
    name: str, shape: Shape, mode: str, dtype: torch.dtype, device: torch.device, kind: str
) -> Comparison:
    moved = _elements(shape, kind) * (torch.finfo(dtype).bits // 8)
    sets = _input_sets(moved, device)
    functions = _functions(shape, mode, device, kind)
    inputs = [_inputs(shape, dtype, device, seed, kind != "forward") for seed in range(sets)]

    def exact() -> Results:
        leaves = [x.detach().double().requires_grad_(kind != "forward") for x in inputs[0]]
        function = partial(packed_prefix_attention, mode=mode, backend="reference")
        return _call(function, kind, [tuple(leaves)])(0)

    return Comparison(
        name=name,
        variants={name: _call(function, kind, inputs) for name, function in functions.items()},
        input_sets=sets,
        exact=exact,
        work=shape.batch,
        unit="images",
        dtype=dtype,
        bytes_moved=moved,
        flops=_PRODUCTS[kind] * _product(shape, mode),
        settings=settings(shape, mode, dtype, kind) | {"compiled": "compiled SDPA" in functions, "threads": None},
    )


def settings(shape: Shape, mode: str, dtype: torch.dtype, kind: str) -> dict[str, object]:
    """Of a comparison, for the record."""
    return vars(shape) | {"mode": mode, "dtype": str(dtype), "kind": kind}


def _elements(shape: Shape, kind: str) -> int:
    """Fewest elements to move: forward reads q, k, v and the prefix and writes out; backward reads these again and
    dout and writes their gradients. What a forward pass saves for its backward could be computed again."""
    tokens = shape.batch * shape.tokens * shape.heads * shape.head_dim
    batch, length = shape.prefix_size()
    prefix = batch * length * shape.heads * shape.head_dim
    forward, backward = 4 * tokens + 2 * prefix, 7 * tokens + 4 * prefix
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}[kind]


def _product(shape: Shape, mode: str) -> int:
    """Operations of one matrix product over all keys of all branches."""
    length = shape.prefix_size()[1]
    keys = length if mode == "additive" else shape.tokens + length
    return 2 * shape.batch * shape.heads * shape.tokens * keys * shape.head_dim


def _call(function: Function, kind: str, inputs: list[tuple[Tensor, ...]]) -> Callable[[int], Results]:
    """The variant that runs `function` on the input set of an index, as `kind` says."""
    graphs: dict[tuple[int, int], tuple[list[Tensor], Tensor]] = {}

    def forward(index: int) -> Results:
        with torch.no_grad():
            return (function(*inputs[index][:3]),)

    def both(index: int) -> Results:
        *leaves, dout = inputs[index]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout.detach())

    def backward(index: int) -> Results:
        *leaves, dout = inputs[index]
        # Autograd runs a backward pass on its forward's stream and hands gradients over on the stream where a graph
        # that is still held first used the leaves, so that a capture needs a forward and leaves of its own.
        key = index, _stream(dout)
        if key not in graphs:
            own = [x.detach().requires_grad_() for x in leaves]
            graphs[key] = own, function(*own)
        own, out = graphs[key]
        return torch.autograd.grad(out, own, dout.detach(), retain_graph=True)

    return {"forward": forward, "backward": backward, "forward + backward": both}[kind]


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else 0


def _functions(shape: Shape, mode: str, device: torch.device, kind: str) -> dict[str, Function]:
    """The variants by name, the eager baseline first and ours last.

    SDPA by backend and FlexAttention are for GPUs: a CPU has one fused SDPA kernel, which `SDPA` takes, and
    FlexAttention has no backward pass there.
    """
    on_gpu = device.type == "cuda"
    kernels = _KERNELS if on_gpu else {}
    functions = {"eager": _backend(mode, "reference"), "SDPA": _backend(mode, "torch")}
    functions |= {name: _available(_backend(mode, "torch", kernel)) for name, kernel in kernels.items()}
    if kind != "backward" and (on_gpu or (shape in _CPU_COMPILED and kind == "forward + backward")):
        functions["compiled eager"] = compiled(_backend(mode, "reference"))
        functions["compiled SDPA"] = compiled(_backend(mode, "torch"))
    if kind == "forward + backward":
        for name, kernel in kernels.items():
            functions[f"compiled {name}"] = _available(compiled(_backend(mode, "torch", kernel)))
        if on_gpu:
            functions["FlexAttention"] = compiled(_flex(mode))
    own = backends.resolve("auto", device)
    if own in FUSED:
        functions["fused"] = _backend(mode, own)
    return functions


def _backend(mode: str, name: str, kernel: SDPBackend | None = None) -> Function:
    """Prefix attention by one of the library's backends, its SDPA calls restricted to `kernel` if there is one."""

    def function(qkv: Tensor, prefix: Tensor, gate: Tensor) -> Tensor:
        return packed_prefix_attention(qkv, prefix, gate, mode=mode, backend=name)

    def restricted(qkv: Tensor, prefix: Tensor, gate: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return packed_prefix_attention(qkv, prefix, gate, mode=mode, backend=name)

    return function if kernel is None else restricted


def _flex(mode: str) -> Function:
    """Prefix attention composed of FlexAttention calls; compile it, uncompiled it materialises the scores."""

    def function(qkv: Tensor, prefix: Tensor, gate: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # [B, H, N, D]
        p_k, p_v = (x.expand(q.shape[0], -1, -1, -1).transpose(1, 2) for x in prefix.unbind(2))  # [B, H, L, D]
        g = gate.to(q.dtype)[:, None, None]
        if mode == "gated":
            out = flex_attention(q, k, v) + g * flex_attention(q, p_k, p_v)
        elif mode == "concat":
            out = flex_attention(q, torch.cat([k, g * p_k], dim=2), torch.cat([v, g * p_v], dim=2))
        else:
            out = flex_attention(q, k + g * p_k, v + g * p_v)
        return out.transpose(1, 2)

    return function


def _available(function: Function) -> Function:
    """`function`, which raises `Unavailable` with PyTorch's own reasons where SDPA's backend refuses the case."""

    def checked(*inputs: Tensor) -> Tensor:
        try:
            return function(*inputs)
        except RuntimeError as error:
            refusal = _REFUSAL.search(str(error))
            if refusal is None:
                raise
            raise Unavailable(_reasons(function, inputs) or refusal.group()) from error

    return checked


def _reasons(function: Function, inputs: tuple[Tensor, ...]) -> str:
    """What PyTorch warns of when it refuses: it names its reasons nowhere else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(RuntimeError):
            function(*inputs)
    texts = [re.sub(r"\s*\(Triggered internally.*", "", str(w.message), flags=re.DOTALL) for w in caught]
    return " ".join(dict.fromkeys(texts))


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv, prefix and gate, which want gradients if `grad`, and dout."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    qkv = normal(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
    prefix = normal(*shape.prefix_size(), 2, shape.heads, shape.head_dim)
    gate = torch.rand(shape.heads, generator=generator, device=device) + 0.5
    dout = normal(shape.batch, shape.tokens, shape.heads, shape.head_dim)
    return qkv.requires_grad_(grad), prefix.requires_grad_(grad), gate.requires_grad_(grad), dout


def _input_sets(bytes_moved: int, device: torch.device) -> int:
    """Enough sets that one round over them moves twice the second-level cache."""
    if device.type != "cuda":
        return 1
    second_level = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(16, -(-2 * second_level // bytes_moved)))
