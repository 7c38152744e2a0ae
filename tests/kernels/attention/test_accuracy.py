"""Prefix attention against float64, over shapes, dtypes, modes and backends."""

from __future__ import annotations

import pytest
import torch

from fedperfix_kernels.attention import MODES
from tests.kernels.attention.cases import (
    DTYPES,
    FLOAT64,
    NAMES,
    Case,
    assert_within_twice_plain_pytorch,
    explicit,
    interpreter_cannot,
    long_in_the_interpreter,
    make_inputs,
    run,
)

# One dimension varies at a time: tokens at, below and above block boundaries and of real ViTs (50, 65, 197, 257,
# 577), head widths of real models and odd ones, prefix lengths from none to longer than a block.
TOKENS = [Case(1, tokens, 1, 16) for tokens in (1, 7, 16, 49, 50, 64, 65, 196, 197, 208, 256, 257, 577)]
HEAD_DIMS = [Case(1, 18, 2, head_dim) for head_dim in (32, 48, 64, 72, 80, 96, 100, 127, 128)]
TINY_HEADS = [Case(2, 9, 3, head_dim) for head_dim in (1, 8)]
PREFIXES = [Case(2, 33, 2, 16, length) for length in (0, 1, 8, 10, 16, 50, 64, 130)]
SHARED = [Case(3, 33, 2, 16, length, shared=True) for length in (1, 10, 33, 65)]
LARGE_SCORES = [Case(2, 50, 2, 32, amplitude=5.0), Case(1, 65, 2, 64, 10, amplitude=5.0)]
SHAPES = [*TOKENS, *HEAD_DIMS, *TINY_HEADS, *PREFIXES, *SHARED, *LARGE_SCORES]


def fits(case: Case) -> bool:
    return case.mode != "additive" or case.prefix_len in (None, case.tokens)


LONG_TOKENS = (196, 208, 256, 257, 577)  # take the interpreter minutes; 197 has several blocks as well
CASES = [case.with_mode(mode) for case in SHAPES for mode in MODES if fits(case.with_mode(mode))]


@pytest.mark.parametrize(
    "case",
    [long_in_the_interpreter(case) if case.tokens in LONG_TOKENS else case for case in CASES],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_triton_in_float32(case: Case, device: torch.device) -> None:
    inputs = make_inputs(case, device, torch.float32)
    assert_within_twice_plain_pytorch(case, inputs, run(inputs, case.mode, "triton"))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_native(dtype: torch.dtype, case: Case, instruction_set: str) -> None:
    inputs = make_inputs(case, torch.device("cpu"), dtype)
    assert_within_twice_plain_pytorch(case, inputs, run(inputs, case.mode, "native"))


HALF_CASES = [case.with_mode(m) for case in (Case(2, 50, 2, 32), Case(1, 197, 1, 64)) for m in MODES]
HALF_CASES += [Case(3, 33, 2, 48, 10, shared=True, mode=m) for m in ("gated", "concat")]
HALF_CASES += [Case(1, 65, 2, 64, amplitude=5.0, mode=mode) for mode in MODES]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_triton_in_half_precision(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    if interpreter_cannot(dtype):
        pytest.skip("the interpreter's bfloat16 products are wrong; compiled ahead of time and run on GPUs")
    inputs = make_inputs(case, device, dtype)
    assert_within_twice_plain_pytorch(case, inputs, run(inputs, case.mode, "triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_torch_backend(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_inputs(case, device, dtype)
    assert_within_twice_plain_pytorch(case, inputs, run(inputs, case.mode, "torch"))


@pytest.mark.parametrize("length", [0, 1, 10])
@pytest.mark.parametrize("mode", ["gated", "concat"])
@pytest.mark.parametrize("backend", ["torch", "triton", "native"])
def test_short_prefixes_agree_with_the_reference(length: int, mode: str, backend: str, device) -> None:
    case = Case(2, 9, 2, 16, length, mode=mode)
    inputs = make_inputs(case, device, torch.float32)
    assert_within_twice_plain_pytorch(case, inputs, run(inputs, mode, backend))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [False, True])
def test_reference_is_the_formula(mode: str, shared: bool) -> None:
    inputs = make_inputs(Case(3, 11, 2, 8, shared=shared), torch.device("cpu"), torch.float64)
    out = run(inputs, mode, "reference")[0]
    torch.testing.assert_close(out, explicit(inputs, mode), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FLOAT64)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_float64_equals_the_reference(mode: str, shared: bool, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(3, 37, 2, 24, shared=shared), device, torch.float64)
    expected = run(inputs, mode, "reference")
    for name, x, y in zip(NAMES, run(inputs, mode, backend), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", FLOAT64)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, backend: str, device: torch.device) -> None:
    from fedperfix_kernels import packed_prefix_attention

    inputs = make_inputs(Case(1, 3, 1, 2, mode=mode), device, torch.float64)
    arguments = [x.requires_grad_() for x in (inputs.qkv, inputs.prefix, inputs.gate)]

    def function(qkv: torch.Tensor, prefix: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return packed_prefix_attention(qkv, prefix, gate, mode=mode, backend=backend)

    slow = backend == "triton"
    assert torch.autograd.gradcheck(function, arguments, eps=1e-5, atol=1e-5, fast_mode=slow)
