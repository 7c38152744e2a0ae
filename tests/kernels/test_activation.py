"""GELU and tanh by the native kernels: against float64, for every instruction set, in models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedperfix_kernels import activation, apply_prefix, native
from fedperfix_kernels.activation import gelu, tanh
from fedperfix_kernels.nn import NativeGELU, set_activations

pytestmark = pytest.mark.skipif(bool(native.obstacle()), reason="the library of native kernels does not run here")
SETS = [] if native.obstacle() else [name for name, state in native.instruction_sets().items() if state == "runs"]
OPERATORS = torch.ops.fedperfix
# Error in units of max(1, |x|); half-precision results are rounded besides.
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-15}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(params=SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    native.use_instruction_set(request.param)
    yield
    native.use_instruction_set(None)


def numbers(count: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(count, generator=torch.Generator().manual_seed(count))).to(dtype)


def check(found: Tensor, exact: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype is dtype
    assert found.shape == exact.shape
    error = (found.double() - exact).abs() / x.double().abs().clamp_min(1)
    assert error.numel() == 0 or error.max() <= TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("count", [0, 1, 3, 7, 16, 511, 512, 513, 16384, 16385, 40001])
def test_values_and_gradients_are_those_of_float64(count: int, dtype: torch.dtype) -> None:
    x, dout = numbers(count, dtype), numbers(count, dtype, 0.4).clamp(-1, 1)
    exact, ours = x.double().requires_grad_(), x.clone().requires_grad_()
    for function, reference in ((OPERATORS.gelu, F.gelu), (OPERATORS.tanh, torch.tanh)):
        value, expected = function(ours), reference(exact)
        check(value, expected, x, dtype)
        (found,) = torch.autograd.grad(value, ours, dout)
        (wanted,) = torch.autograd.grad(expected, exact, dout.double())
        check(found, wanted, x, dtype)


def test_every_float_has_its_value() -> None:
    x = torch.cat([torch.linspace(-20, 20, 200_001), torch.logspace(-38, 38, 1001), -torch.logspace(-38, 38, 1001)])
    check(gelu(x), F.gelu(x.double()), x, torch.float32)
    check(tanh(x), torch.tanh(x.double()), x, torch.float32)
    small = x[(x.abs() < 3) & (x != 0)]
    for found, exact in ((gelu(small), F.gelu(small.double())), (tanh(small), torch.tanh(small.double()))):
        normal = exact.abs() > 1e-37
        assert ((found.double() - exact)[normal] / exact[normal]).abs().max() < 4e-6
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    torch.testing.assert_close(tanh(special), torch.tanh(special), equal_nan=True)
    torch.testing.assert_close(gelu(special), torch.tensor([torch.nan, torch.inf, 0.0, 0.0]), equal_nan=True)


def test_the_bits_do_not_depend_on_the_threads() -> None:
    x, dout, threads = numbers(100_003), numbers(100_003, scale=0.5), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([OPERATORS.gelu(x), OPERATORS.gelu_backward(dout, x), OPERATORS.tanh(x)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_memory_may_lie_in_any_order() -> None:
    x = numbers(6 * 10).view(6, 10)
    for view in (x.t(), x[:, ::2], x[1:, 3:], x[:1].expand(4, 10), torch.tensor(0.5)):
        torch.testing.assert_close(gelu(view), F.gelu(view))
        torch.testing.assert_close(OPERATORS.gelu_backward(view, view), torch.ops.aten.gelu_backward(view, view))
        torch.testing.assert_close(tanh(view), torch.tanh(view))


def test_the_operators_pass_opcheck() -> None:
    x = numbers(30).view(5, 6)
    for given in (x, x.t()):
        torch.library.opcheck(OPERATORS.gelu.default, (given.clone().requires_grad_(),))
        torch.library.opcheck(OPERATORS.tanh.default, (given.clone().requires_grad_(),))
        torch.library.opcheck(OPERATORS.gelu_backward.default, (given, given.clone()))


@pytest.mark.parametrize("function", [OPERATORS.gelu, OPERATORS.tanh])
def test_second_derivatives(function) -> None:
    x = numbers(9, torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(function, x)


def test_transformed_and_compiled_they_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedperfix_kernels.activation._run", lambda *_: pytest.fail("computed by the library"))
    x = numbers(12).view(3, 4)
    torch.testing.assert_close(torch.func.vmap(gelu)(x), F.gelu(x))
    torch.testing.assert_close(torch.func.grad(lambda x: tanh(x).sum())(x), 1 - torch.tanh(x).square())
    compiled = torch.compile(lambda x: gelu(x) + tanh(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.gelu(x) + torch.tanh(x))


def test_mapped_without_gradients_they_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = [], activation._run
    monkeypatch.setattr(activation, "_run", lambda name, x: calls.append((name, tuple(x.shape))) or run(name, x))
    x = numbers(12).view(3, 4)
    with torch.no_grad():
        for function, expected in ((gelu, F.gelu(x)), (tanh, torch.tanh(x))):
            torch.testing.assert_close(torch.func.vmap(function)(x), expected)
            torch.testing.assert_close(torch.func.vmap(function, 1, 1)(x), expected)
    assert {name for name, _ in calls} == {"gelu_forward", "tanh_forward"}
    assert len(calls) == 4  # one call for all rows


def test_wrong_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"x: got a list, takes a torch.Tensor"):
        gelu([1.0])
    with pytest.raises(TypeError, match=r"x: got a float, takes a torch.Tensor"):
        tanh(1.0)
    with pytest.raises(ValueError, match=r"x: got shape \(2,\), torch.int64, cpu, takes float32, bfloat16, "):
        OPERATORS.gelu(torch.tensor([1, 2]))
    for wrong in (torch.ones(3), torch.ones(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"dout: got .*, takes shape and dtype of x, which are shape \(2,\)"):
            OPERATORS.gelu_backward(wrong, torch.ones(2))


@pytest.mark.parametrize("mode", ["gated", "additive"])
def test_a_model_computes_the_same_and_can_go_back(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def vit() -> nn.Module:
        torch.manual_seed(0)
        model = VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=5)
        return apply_prefix(model, bottleneck=5, init="default", mode=mode)

    plain, ours, images = vit(), vit(), numbers(2 * 3 * 64).view(2, 3, 8, 8)
    set_activations(ours, "native")
    assert sum(type(module) is NativeGELU for module in ours.modules()) == 2
    for model in (plain, ours):
        F.cross_entropy(model(images), torch.arange(2)).backward()
    torch.testing.assert_close(ours(images), plain(images), rtol=1e-5, atol=1e-5)
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
    with monkeypatch.context() as patch:
        patch.setattr("fedperfix_kernels.nn.activation.gelu", lambda _: pytest.fail("computed by the library"))
        patch.setattr("fedperfix_kernels.activation._run", lambda *_: pytest.fail("computed by the library"))
        set_activations(ours, "torch")
        assert torch.equal(ours(images), plain(images))


def test_other_activations_stay() -> None:
    model = nn.Sequential(nn.GELU(approximate="tanh"), nn.Tanh(), nn.ReLU(), nn.GELU())
    set_activations(model, "native")
    assert [type(module) for module in model] == [nn.GELU, nn.Tanh, nn.ReLU, NativeGELU]


def test_a_choice_is_refused_rather_than_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="implementation: got 'auto', takes one of 'torch', 'native'"):
        set_activations(nn.GELU(), "auto")
    monkeypatch.setattr(native, "obstacle", lambda: "there is no library")
    with pytest.raises(ValueError, match="implementation: got 'native', but there is no library; use 'torch'"):
        set_activations(nn.GELU(), "native")
