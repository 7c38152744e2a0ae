"""PrefixWindowAttention: relative positions, shifted windows and a prefix, and a Swin Transformer made of it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor, nn

from fedperfix_kernels import PrefixWindowAttention, apply_prefix, prefix_parameters
from fedperfix_kernels.nn.window import relative_position_index

DIM, HEADS, WINDOW = 12, 3, (2, 3)


def make(mode: str = "gated", prefix: str = "adapter", **options: object) -> PrefixWindowAttention:
    torch.manual_seed(0)
    options = {"mode": mode, "prefix": prefix, "bottleneck": 5, "prefix_len": 4, "gate": 0.7, **options}
    layer = PrefixWindowAttention(DIM, HEADS, window_size=WINDOW, init="default", **options)
    nn.init.normal_(layer.relative_position_bias_table)
    return layer


def windows(batch: int, count: int, masked: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch * count, 6, DIM, generator=generator)
    regions = torch.randint(0, 2, (count, 6), generator=generator)
    mask = torch.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)
    return x, mask if masked else None


def by_hand(layer: PrefixWindowAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """The formula, window by window, head by head and query by query."""
    height, width = WINDOW
    places = [(row, column) for row in range(height) for column in range(width)]
    rows = []
    for window, tokens in enumerate(x):
        q, k, v = layer.qkv(tokens).chunk(3, dim=-1)
        pair = layer.prefix(tokens[None])[0]  # [L, 2, H, D]
        heads = []
        for head in range(HEADS):
            part = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
            gate, p_k, p_v = layer.prefix.gate[head], pair[:, 0, head], pair[:, 1, head]
            keys, values = k[:, part], v[:, part]
            if layer.mode == "additive":
                keys, values = keys + gate * p_k, values + gate * p_v
            out = []
            for i, (y, z) in enumerate(places):
                query = q[i, part] / (DIM // HEADS) ** 0.5
                bias = torch.stack(
                    [
                        layer.relative_position_bias_table[
                            (y - b + height - 1) * (2 * width - 1) + z - c + width - 1
                        ]
                        for b, c in places
                    ]
                )[:, head]
                scores = keys @ query + bias
                if mask is not None:
                    scores = scores + mask[window % len(mask), i]
                if layer.mode == "concat":
                    weights = torch.cat([scores, gate * p_k @ query]).softmax(0)
                    out.append(weights @ torch.cat([values, gate * p_v]))
                    continue
                token = scores.softmax(0) @ values
                if layer.mode == "gated":
                    token = token + gate * ((p_k @ query).softmax(0) @ p_v)
                out.append(token)
            heads.append(torch.stack(out))
        rows.append(layer.proj(torch.cat(heads, dim=-1)))
    return torch.stack(rows)


CASES = [
    (backend, mode, prefix, masked)
    for backend in ("torch", "reference")
    for mode, prefix in (("gated", "adapter"), ("gated", "tokens"), ("concat", "adapter"), ("additive", "adapter"))
    for masked in (False, True)
]


# The interpreter is slow: the kernels' own tests have the bias in every mode.
MASKED = [("triton", "gated", "adapter", True), ("native", "gated", "adapter", True)]


@pytest.mark.parametrize(("backend", "mode", "prefix", "masked"), [*CASES, *MASKED])
def test_output_and_gradients_equal_the_formula_in_float64(
    backend: str, mode: str, prefix: str, masked: bool, device: torch.device
) -> None:
    ours = make(mode, prefix, backend=backend).to(device)
    reference = copy.deepcopy(ours).cpu().double()
    x, mask = windows(batch=2, count=3, masked=masked)
    expected = by_hand(reference, x.double(), None if mask is None else mask.double())
    actual = ours(x.to(device), None if mask is None else mask.to(device))
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (actual * weight.to(device)).sum().backward()
    (expected * weight.double()).sum().backward()
    assert ours.relative_position_bias_table.grad.abs().min() > 1e-6
    for name, parameter in reference.named_parameters():
        gradient = ours.get_parameter(name).grad.cpu().double()
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (4, 1)])
def test_relative_positions_are_timms(size: tuple[int, int]) -> None:
    theirs = WindowAttention(8, num_heads=2, window_size=size)
    assert torch.equal(relative_position_index(*size), theirs.relative_position_index)
    ours = PrefixWindowAttention(8, num_heads=2, window_size=size, bottleneck=4)
    ours.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(4, size[0] * size[1], 8), torch.randn(2, size[0] * size[1], size[0] * size[1])
    torch.testing.assert_close(ours(x, mask), theirs(x, mask), rtol=1e-5, atol=1e-5)


def swin(**options: object) -> SwinTransformer:
    torch.manual_seed(0)
    shape = {"img_size": 64, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **(shape | options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    return model


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"window_size": 3}, {"img_size": 40, "window_size": 4}], ids=str)
def test_a_swin_transformer_computes_what_it_did(options: dict) -> None:
    model = swin(**options)
    shifted = [block for stage in model.layers for block in stage.blocks if any(block.shift_size)]
    assert shifted[0].attn_mask is not None
    x = images(options.get("img_size", 64))
    other = apply_prefix(copy.deepcopy(model), bottleneck=4)
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    other(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_a_swin_transformers_prefix_is_local_and_its_parameters_keep_their_names() -> None:
    model = swin()
    names = {name for name, _ in model.named_parameters()}
    apply_prefix(model, bottleneck=4, depth=3)
    plugins = set(prefix_parameters(model))
    assert {name for name, _ in model.named_parameters()} - plugins == names
    kinds = [type(block.attn) for stage in model.layers for block in stage.blocks]
    assert kinds == [PrefixWindowAttention] * 3 + [WindowAttention]
    assert len(plugins) == 3 * 5
    model(images()).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in plugins)
    model.load_state_dict(swin().state_dict())  # a checkpoint without prefixes loads
    with pytest.raises(ValueError, match="already has a prefix"):
        apply_prefix(model)


def test_wrong_input() -> None:
    layer = make()
    with pytest.raises(ValueError, match=r"x: got shape \(2, 5, 12\).*, takes shape \[batch · windows, 6, 12\]"):
        layer(torch.zeros(2, 5, DIM))
    with pytest.raises(ValueError, match=r"mask: got shape \(6, 6\).*, takes shape \[windows, 6, 6\]"):
        layer(torch.zeros(2, 6, DIM), torch.zeros(6, 6))
    with pytest.raises(ValueError, match=r"G a divisor of 2"):
        layer(torch.zeros(2, 6, DIM), torch.zeros(3, 6, 6))
    with pytest.raises(ValueError, match=r"window_size: got \(4, 4\), takes \(2, 3\), as it was built"):
        layer.set_window_size((4, 4))
    layer.set_window_size((2, 3))
