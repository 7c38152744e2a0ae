"""What only a GPU can show: CUDA graphs, TF32, grids beyond 65,535 and compiled code that uses the kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fedperfix_kernels import packed_prefix_attention
from fedperfix_kernels.attention import MODES
from tests.kernels.attention.cases import NAMES, Case, assert_within_twice_plain_pytorch, make_inputs, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph_replays_the_same_bits(mode: str, device: torch.device) -> None:
    inputs = make_inputs(Case(4, 65, 3, 64, mode=mode), device, torch.bfloat16)
    expected = run(inputs, mode, "triton")
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.qkv, inputs.prefix, inputs.gate)]

    def step() -> tuple[torch.Tensor, ...]:
        out = packed_prefix_attention(*leaves, mode=mode, backend="triton")
        return out, *torch.autograd.grad(out, leaves, inputs.dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for name, x, y in zip(NAMES, captured, expected, strict=True):
        assert torch.equal(x, y), name


def test_tf32_follows_pytorchs_own_setting(device: torch.device) -> None:
    inputs = make_inputs(Case(2, 197, 3, 64), device, torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        outputs = {}
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            outputs[precision] = run(inputs, "gated", "triton")[0]
    finally:
        torch.set_float32_matmul_precision(before)
    exact = run(inputs.to(torch.float64), "gated", "reference")[0]
    errors = {name: (out.double() - exact).abs().max().item() for name, out in outputs.items()}
    assert errors["highest"] < 1e-5 < errors["high"] < 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_more_than_65535_heads(mode: str, device: torch.device) -> None:
    case = Case(22_000, 4, 3, 16, mode=mode)
    inputs = make_inputs(case, device, torch.float16)
    assert_within_twice_plain_pytorch(case, inputs, run(inputs, mode, "triton"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_real_sizes(mode: str, dtype: torch.dtype, device: torch.device) -> None:
    sizes = (
        (8, 50, 3, 32),
        (8, 50, 3, 64),
        (8, 65, 3, 64),
        (8, 128, 3, 64),
        (8, 197, 6, 64),
        (4, 257, 4, 80),
        (4, 577, 2, 128),
    )
    cases = [Case(*size, mode=mode) for size in sizes]
    if mode != "additive":
        cases += [Case(*size, 10, shared=True, mode=mode) for size in sizes]
    for case in cases:
        inputs = make_inputs(case, device, dtype)
        assert_within_twice_plain_pytorch(case, inputs, run(inputs, mode, "triton"))


def test_inductor_calls_the_kernels(device: torch.device) -> None:
    inputs = make_inputs(Case(4, 65, 3, 64), device, torch.bfloat16)
    torch._dynamo.reset()
    function = torch.compile(lambda *x: packed_prefix_attention(*x, backend="triton") * 2, fullgraph=True)
    found = function(inputs.qkv, inputs.prefix, inputs.gate)
    assert torch.equal(found, run(inputs, "gated", "triton")[0] * 2)


def test_reduce_overhead_replays_a_training_step(device: torch.device) -> None:
    """torch.compile's own graph capture, forward and backward, as `fedperfix.train --compile` uses it."""
    inputs = make_inputs(Case(4, 65, 3, 64), device, torch.bfloat16)
    expected = run(inputs, "gated", "triton")
    torch._dynamo.reset()
    function = torch.compile(lambda *x: packed_prefix_attention(*x, backend="triton"), mode="reduce-overhead")
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.qkv, inputs.prefix, inputs.gate)]
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        out = function(*leaves)
        found = out.clone(), *(x.clone() for x in torch.autograd.grad(out, leaves, inputs.dout))
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert torch.equal(x, y), name


def test_an_index_out_of_range_is_not_read_silently(device: torch.device) -> None:
    """In a process of its own, because a failed check on a GPU ends all work on it."""
    script = """
import torch
from fedperfix_kernels import packed_prefix_attention
qkv, table = torch.zeros(2, 5, 3, 1, 16, device="cuda"), torch.zeros(3, 5, 2, 1, 16, device="cuda")
packed_prefix_attention(qkv, table, 1.0, prefix_index=torch.tensor([0, 7], device="cuda"))
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "assert" in result.stderr
