"""What must hold by mathematics, whatever the implementation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedperfix_kernels import prefix_attention
from tests.kernels.attention.cases import Case, Inputs, make_inputs, run

BACKENDS = ("triton", "native", "torch", "reference")


def without_gate(inputs: Inputs) -> Inputs:
    return Inputs(inputs.qkv, inputs.prefix, torch.zeros_like(inputs.gate), inputs.dout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["gated", "additive"])
def test_a_closed_gate_is_plain_attention(mode: str, backend: str, device: torch.device) -> None:
    inputs = without_gate(make_inputs(Case(2, 33, 2, 16), device, torch.float32))
    out = run(inputs, mode, backend)[0]
    q, k, v = (x.transpose(1, 2) for x in inputs.qkv.unbind(2))
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_with_a_closed_gate_has_the_bits_of_no_prefix(backend: str, device: torch.device) -> None:
    inputs = without_gate(make_inputs(Case(2, 33, 2, 16), device, torch.float32))
    empty = Inputs(inputs.qkv, inputs.prefix[:, :0], inputs.gate, inputs.dout)
    closed, base = run(inputs, "gated", backend), run(empty, "gated", backend)
    assert torch.equal(closed[0], base[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_concat_mixes_the_two_branches_by_their_mass(backend: str, device: torch.device) -> None:
    """concat = (1−λ)·A(q,k,v) + λ·A(q,g·p_k,g·p_v), λ = sigmoid(lse_prefix − lse_base)."""
    inputs = make_inputs(
        Case(2, 19, 2, 16, 7), device, torch.float64 if backend in ("torch", "reference") else torch.float32
    )
    q, k, v = inputs.qkv.unbind(2)
    g = inputs.gate[:, None]
    p_k, p_v = (g * x for x in inputs.prefix.unbind(2))

    def branch(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.einsum("bnhd,bmhd->bhnm", q, keys) * q.shape[-1] ** -0.5
        out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), values)
        return out, scores.logsumexp(-1).transpose(1, 2)[..., None]

    (base, base_lse), (prefix, prefix_lse) = branch(k, v), branch(p_k, p_v)
    mass = torch.sigmoid(prefix_lse - base_lse)
    out = run(inputs, "concat", backend)[0]
    torch.testing.assert_close(out, (1 - mass) * base + mass * prefix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_added_to_every_key_changes_nothing(backend: str, device: torch.device) -> None:
    """Softmax shift: in `additive` the key half of a constant prefix has a zero summed gradient."""
    inputs = make_inputs(Case(2, 33, 2, 16), device, torch.float32)
    constant = torch.randn(1, 1, 2, 2, 16).to(device).expand(1, 33, 2, 2, 16).clone()
    constant[:, :, 1] = 0
    shifted = run(Inputs(inputs.qkv, constant, inputs.gate, inputs.dout), "additive", backend)
    plain = run(without_gate(inputs), "additive", backend)[0]
    torch.testing.assert_close(shifted[0], plain, rtol=1e-4, atol=1e-5)
    key_gradient = shifted[2][:, :, 0].sum(1)
    assert key_gradient.abs().max() < 1e-4 * shifted[2][:, :, 0].abs().sum(1).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_is_used(backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(2, 9, 2, 16), device, torch.float32)
    q, k, v = inputs.qkv.unbind(2)
    pair = inputs.prefix.unbind(2)
    scaled = prefix_attention(q, k, v, *pair, 0.5, scale=0.5, backend=backend)
    by_hand = prefix_attention(q * 2, k, v, *pair, 0.5, backend=backend)  # 0.25 is 1/√16
    torch.testing.assert_close(scaled, by_hand, rtol=1e-5, atol=1e-6)
