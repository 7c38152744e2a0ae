"""Inputs, the float64 reference and the error bound that the attention tests share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedperfix_kernels import packed_prefix_attention, prefix_attention
from fedperfix_kernels.attention import MODES
from fedperfix_kernels.backends import INTERPRETING

NAMES = ("out", "dqkv", "dprefix", "dgate")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The kernels that also run in float64, for checks: Triton's do in its interpreter only.
FLOAT64 = (
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETING, reason="no float64 on a GPU")),
    "native",
)


def long_in_the_interpreter(*values: Any) -> Any:
    """Parameters of a Triton test that takes the interpreter many seconds; on a GPU they run every time."""
    return pytest.param(*values, marks=[pytest.mark.long] if INTERPRETING else [])


def each_mode(backends: Iterable[str]) -> list[Any]:
    """All pairs of mode and backend.

    In the interpreter `gated` stands for all modes, unless `-m long` asks for them; test_accuracy.py has every mode
    every time.
    """
    pairs = [(mode, backend) for mode in MODES for backend in backends]
    return [
        long_in_the_interpreter(*pair) if pair[1] == "triton" and pair[0] != "gated" else pytest.param(*pair)
        for pair in pairs
    ]


@dataclass(frozen=True)
class Case:
    """One shape of prefix attention; `prefix_len` None is one prefix key per token."""

    batch: int = 2
    tokens: int = 17
    heads: int = 2
    head_dim: int = 16
    prefix_len: int | None = None
    shared: bool = False
    mode: str = "gated"
    amplitude: float = 1.0

    def __str__(self) -> str:
        shared = "-shared" if self.shared else ""
        length = "N" if self.prefix_len is None else self.prefix_len
        return f"{self.mode}-B{self.batch}-N{self.tokens}-H{self.heads}-D{self.head_dim}-L{length}{shared}"

    def with_mode(self, mode: str) -> Case:
        return replace(self, mode=mode)


@dataclass
class Inputs:
    """Packed projections, gate and the gradient of the output."""

    qkv: Tensor
    prefix: Tensor
    gate: Tensor
    dout: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x.to(dtype) for x in (self.qkv, self.prefix, self.gate, self.dout)))


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs, exactly representable in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    length = case.tokens if case.prefix_len is None else case.prefix_len
    prefix_batch = 1 if case.shared else case.batch

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    return Inputs(
        qkv=normal(case.batch, case.tokens, 3, case.heads, case.head_dim) * case.amplitude,
        prefix=normal(prefix_batch, length, 2, case.heads, case.head_dim) * case.amplitude,
        gate=(normal(case.heads) * 0.5 + 0.7).to(dtype),
        dout=normal(case.batch, case.tokens, case.heads, case.head_dim),
    )


def run(inputs: Inputs, mode: str, backend: str, packed: bool = True) -> tuple[Tensor, ...]:
    """(out, dqkv, dprefix, dgate) of one backend."""
    qkv, prefix, gate = (x.detach().clone().requires_grad_() for x in (inputs.qkv, inputs.prefix, inputs.gate))
    if packed:
        out = packed_prefix_attention(qkv, prefix, gate, mode=mode, backend=backend)
    else:
        out = prefix_attention(*qkv.unbind(2), *prefix.unbind(2), gate, mode=mode, backend=backend)
    return out.detach(), *torch.autograd.grad(out, (qkv, prefix, gate), inputs.dout)


def explicit(inputs: Inputs, mode: str) -> Tensor:
    """The formulas once more in float64 and einsum, independent of the package's reference."""
    q, k, v = (x.double() for x in inputs.qkv.unbind(2))
    p_k, p_v = (x.double().expand(q.shape[0], -1, -1, -1) for x in inputs.prefix.unbind(2))
    g = inputs.gate.double().view(1, 1, -1, 1)

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        scores = torch.einsum("bnhd,bmhd->bhnm", q, keys) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhd->bnhd", torch.softmax(scores, -1), values)

    if mode == "gated":
        return attend(k, v) + g * attend(p_k, p_v)
    if mode == "concat":
        return attend(torch.cat([k, g * p_k], 1), torch.cat([v, g * p_v], 1))
    return attend(k + g * p_k, v + g * p_v)


def assert_within_twice_plain_pytorch(case: Case, inputs: Inputs, results: tuple[Tensor, ...]) -> None:
    """Each result's error against float64 is at most twice that of plain PyTorch in the same dtype.

    Both errors are taken in the maximum norm. An absolute allowance covers results that plain PyTorch happens to
    round exactly: four units in the last place of the reference's largest value, and twice as many float32 units as
    the largest score's terms, because a fused backward pass recomputes exp(s − lse), and forward and backward may
    add up s in different orders. The gate's gradient, one number per head, is a sum of B·N·D terms of either sign:
    it has the terms' own rounding, and that of the scores in each of the B·N tokens by itself.
    """
    exact = run(inputs.to(torch.float64), case.mode, "reference")
    plain = run(inputs, case.mode, "reference")
    eps = torch.finfo(inputs.qkv.dtype).eps
    scores = 2 * _score_terms(inputs) * torch.finfo(torch.float32).eps
    for name, result, reference, baseline in zip(NAMES, results, exact, plain, strict=True):
        assert result.shape == reference.shape, name
        if reference.numel() == 0:
            continue
        error = (result.double() - reference).abs().max().item()
        allowed = 2 * (baseline.double() - reference).abs().max().item()
        if name == "dgate":
            terms, tokens = _gate_terms(case, inputs)
            allowed += eps * terms + scores * tokens
        else:
            allowed += (4 * eps + scores) * reference.abs().max().item()
        assert error <= allowed, f"{case} {name}: error {error:.3e} exceeds {allowed:.3e}"


def _score_terms(inputs: Inputs) -> float:
    """max |q| |k|ᵀ / √D over both branches, in float64: what a score's rounding is measured by."""
    q, k, _ = (x.double().abs() for x in inputs.qkv.unbind(2))
    keys = [k, inputs.prefix[:, :, 0].double().abs().expand(q.shape[0], -1, -1, -1)]
    scores = [torch.einsum("bnhd,bmhd->bhnm", q, x) for x in keys if x.shape[1]]
    return max(x.max().item() for x in scores) / q.shape[-1] ** 0.5


def _gate_terms(case: Case, inputs: Inputs) -> tuple[float, float]:
    """Of t = dout ∘ ∂out/∂g, Σ |t| and √Σ (Σ_D t)² over the tokens, each of the head where it is largest."""
    exact = inputs.to(torch.float64)

    def out(gate: Tensor) -> Tensor:
        return packed_prefix_attention(exact.qkv, exact.prefix, gate, mode=case.mode, backend="reference")

    _, tangent = torch.func.jvp(out, (exact.gate,), (torch.ones_like(exact.gate),))
    terms = exact.dout * tangent  # [B, N, H, D]
    tokens = terms.sum(3).square().sum((0, 1)).sqrt()
    return terms.abs().sum((0, 1, 3)).max().item(), tokens.max().item()


def interpreter_cannot(dtype: torch.dtype) -> bool:
    """True where Triton's interpreter gives wrong products: in bfloat16."""
    return INTERPRETING and dtype == torch.bfloat16
