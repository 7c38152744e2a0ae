"""Bias, key mask and prefix table against float64, and the identities that define them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from fedperfix_kernels import packed_prefix_attention, prefix_attention
from fedperfix_kernels.attention import MODES
from fedperfix_kernels.backends import INTERPRETING
from tests.kernels.attention.cases import FLOAT64, each_mode

BACKENDS = ("triton", "native", "torch")
BATCH, HEADS, HEAD_DIM, CLIENTS = 4, 2, 16, 3
OPTIONS = {
    "bias": ("bias",),
    "bias of two windows": ("windows",),
    "key mask": ("key_mask",),
    "table": ("prefix_index",),
    "everything": ("windows", "key_mask", "prefix_index"),
}


def make(options: tuple[str, ...], tokens: int, prefix_len: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs in float64 by argument name; image 1 has no key at all where there is a mask."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double().to(device)

    table = "prefix_index" in options
    inputs = {
        "qkv": normal(BATCH, tokens, 3, HEADS, HEAD_DIM),
        "prefix": normal(CLIENTS if table else BATCH, prefix_len, 2, HEADS, HEAD_DIM),
        "gate": normal(CLIENTS, HEADS) if table else normal(HEADS),
    }
    if "bias" in options:
        inputs["bias"] = normal(HEADS, tokens, tokens)
    if "windows" in options:
        inputs["bias"] = normal(2, 1, tokens, tokens)
    if "key_mask" in options:
        inputs["key_mask"] = (torch.rand(BATCH, tokens, generator=generator) > 0.3).to(device)
        inputs["key_mask"][1] = False
    if table:
        inputs["prefix_index"] = torch.tensor([2, 0, 2, 2], device=device)
    return inputs


def taken(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The inputs, in float32 where the backend takes no float64: the kernels on a GPU."""
    if backend != "triton" or INTERPRETING:
        return inputs
    return {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}


def results(inputs: dict[str, Tensor], mode: str, backend: str) -> dict[str, Tensor]:
    """out and the gradient of every floating input."""
    given = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    out = packed_prefix_attention(**given, mode=mode, backend=backend)
    weights = torch.arange(out.numel(), device=out.device).view(out.shape).sin().to(out.dtype)
    leaves = {name: x for name, x in given.items() if x.requires_grad}
    gradients = torch.autograd.grad(out, list(leaves.values()), weights)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize(("mode", "backend"), each_mode(BACKENDS))
@pytest.mark.parametrize(("tokens", "prefix_len"), [(17, 17), (33, 5), (9, 0)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("poisoned")
def test_against_float64(options: str, tokens: int, prefix_len: int, mode: str, backend: str, device) -> None:
    if mode == "additive" and tokens != prefix_len:
        pytest.skip("additive takes one prefix key per token")
    exact = make(OPTIONS[options], tokens, prefix_len, device)
    expected = results(exact, mode, "reference")
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in exact.items()}
    for name, found in results(inputs, mode, backend).items():
        assert found.shape == expected[name].shape
        if found.numel():
            error = (found.double() - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-30)
            assert error <= 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_stays_close(mode: str, backend: str, device: torch.device) -> None:
    exact = make(OPTIONS["everything"], 33, 33, device)
    inputs = {name: x.half() if x.is_floating_point() else x for name, x in exact.items()}
    rounded = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = results(rounded, mode, "reference")
    for name, found in results(inputs, mode, backend).items():
        assert (found.double() - expected[name]).norm() <= 5e-3 * expected[name].norm(), name


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_masked_tokens_might_as_well_not_be_there(mode: str, backend: str, device: torch.device) -> None:
    """Padding behind the key mask changes nothing, whatever it holds."""
    inputs = taken(make((), 12, 12, device), backend)
    short = {n: x[:, :9] if n != "gate" and (n == "qkv" or mode == "additive") else x for n, x in inputs.items()}
    key_mask = (torch.arange(12, device=device) < 9).expand(BATCH, 12)
    padded = packed_prefix_attention(**inputs, key_mask=key_mask, mode=mode, backend=backend)
    alone = packed_prefix_attention(**short, mode=mode, backend=backend)
    torch.testing.assert_close(padded[:, :9], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_an_image_without_keys_has_a_base_branch_of_zeros(backend: str, device: torch.device) -> None:
    inputs = taken(make(("key_mask",), 9, 9, device), backend)
    out = packed_prefix_attention(**inputs | {"gate": torch.zeros(HEADS, device=device)}, backend=backend)
    assert out[1].abs().max() == 0
    assert out[0].abs().min() > 0
    additive = results(inputs, "additive", backend)
    assert additive["out"][1].abs().max() == 0
    assert additive["qkv"][1].abs().max() == 0


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_a_constant_bias_changes_nothing_where_there_is_one_softmax_per_branch(mode, backend, device) -> None:
    inputs = taken(make((), 9, 9, device), backend)
    constant = torch.full((HEADS, 9, 9), 3.0, dtype=inputs["qkv"].dtype, device=device)
    plain = packed_prefix_attention(**inputs, mode=mode, backend=backend)
    shifted = packed_prefix_attention(**inputs, bias=constant, mode=mode, backend=backend)
    assert torch.allclose(plain, shifted, atol=1e-5) == (mode != "concat")


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_a_table_equals_each_image_with_its_own_prefix(mode: str, backend: str, device: torch.device) -> None:
    """10,000 clients in one table; only the rows that are named matter, the others hold NaN."""
    clients, tokens = 10_000, 5
    index = torch.tensor([9_999, 17, 17, 0], device=device)
    table = torch.full((clients, tokens, 2, HEADS, HEAD_DIM), torch.nan, device=device)
    gates = torch.full((clients, HEADS), torch.nan, device=device)
    table[index], gates[index] = (
        torch.randn(4, tokens, 2, HEADS, HEAD_DIM, device=device),
        torch.rand(4, HEADS, device=device),
    )
    qkv = torch.randn(4, tokens, 3, HEADS, HEAD_DIM, device=device)
    together = packed_prefix_attention(qkv, table, gates, prefix_index=index, mode=mode, backend=backend)
    for image, client in enumerate(index.tolist()):
        one = slice(image, image + 1)
        alone = packed_prefix_attention(qkv[one], table[client][None], gates[client], mode=mode, backend=backend)
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_frozen_backbone_trains_the_named_rows_only(backend: str, device: torch.device) -> None:
    inputs = taken(make(("prefix_index",), 9, 4, device), backend)
    table = inputs["prefix"].requires_grad_()
    out = packed_prefix_attention(
        inputs["qkv"], table, inputs["gate"], prefix_index=inputs["prefix_index"], backend=backend
    )
    (gradient,) = torch.autograd.grad(out.square().sum(), table)
    assert gradient[1].abs().max() == 0  # client 1 has no image
    assert gradient[0].abs().max() > 0
    assert gradient[2].abs().max() > 0


@pytest.mark.parametrize(("mode", "backend"), each_mode(["triton", "native"]))
def test_the_same_input_gives_the_same_bits(mode: str, backend: str, device: torch.device) -> None:
    inputs = {
        n: x.float() if x.is_floating_point() else x for n, x in make(OPTIONS["everything"], 17, 17, device).items()
    }
    first, second = results(inputs, mode, backend), results(inputs, mode, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", FLOAT64)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, backend: str, device: torch.device) -> None:
    inputs = make(OPTIONS["everything"], 3, 3, device)
    fixed = {name: inputs.pop(name) for name in ("key_mask", "prefix_index")}
    names, values = list(inputs), [x.requires_grad_() for x in inputs.values()]

    def function(*tensors: Tensor) -> Tensor:
        return packed_prefix_attention(
            **dict(zip(names, tensors, strict=True)), **fixed, mode=mode, backend=backend
        )

    assert torch.autograd.gradcheck(function, values, eps=1e-5, atol=1e-5, fast_mode=True)


ERRORS = [
    ({"bias": [1.0]}, TypeError, "bias: got a list, takes a torch.Tensor"),
    ({"bias": torch.zeros(2, 5, 4)}, ValueError, "bias: got shape (2, 5, 4)"),
    ({"bias": torch.zeros(3, 2, 5, 5)}, ValueError, "G a divisor of 4"),
    ({"bias": torch.zeros(2, 5, 5).bool()}, TypeError, "pass bool masks of keys as key_mask"),
    ({"bias": torch.zeros(2, 5, 5, device="meta")}, ValueError, "bias: got a tensor on meta"),
    ({"key_mask": torch.ones(4, 6).bool()}, ValueError, "key_mask: got shape (4, 6)"),
    ({"key_mask": torch.ones(4, 5)}, TypeError, "key_mask: got torch.float32, takes torch.bool"),
    ({"prefix_index": torch.zeros(3).long()}, ValueError, "prefix_index: got shape (3,)"),
    ({"prefix_index": torch.zeros(4)}, TypeError, "prefix_index: got torch.float32, takes torch.int32"),
    (
        {"prefix_index": torch.tensor([0, 1, 7, 0])},
        ValueError,
        "takes numbers from 0 to 6, rows of the prefix table",
    ),
    ({"prefix_index": torch.tensor([0, -1, 2, 0])}, ValueError, "prefix_index: got a number out of range"),
    ({"gate": torch.zeros(6, 2), "prefix_index": torch.zeros(4).long()}, ValueError, "[], [1] or [2] or [7, 2]"),
]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("changes", "error", "text"), ERRORS, ids=[text for _, _, text in ERRORS])
def test_wrong_arguments(changes: dict, error: type[Exception], text: str, backend: str) -> None:
    if backend == "triton" and not INTERPRETING:
        pytest.skip("these tensors are on the CPU")
    q = torch.zeros(4, 5, 2, 8)
    prefix = torch.zeros(7 if "prefix_index" in changes else 4, 3, 2, 8)
    arguments = {"gate": 1.0} | changes
    with pytest.raises(error, match=re.escape(text)):
        prefix_attention(q, q, q, prefix, prefix, **arguments, backend=backend)
