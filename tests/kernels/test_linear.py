"""Linear layers by oneDNN: the operator against float64, under every transformation, and where it is chosen."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedperfix_kernels import apply_prefix
from fedperfix_kernels.linear import _is_amd_from, onednn_obstacle, resolve_linear
from fedperfix_kernels.linear import linear as by_onednn
from fedperfix_kernels.nn import ChosenLinear, set_linear

needs_onednn = pytest.mark.skipif(bool(onednn_obstacle()), reason="this PyTorch has no oneDNN operator")
OPERATOR = torch.ops.fedperfix.linear.default


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def leaves(*shapes: tuple[int, ...] | None) -> list[Tensor | None]:
    return [None if shape is None else random(*shape).requires_grad_() for shape in shapes]


def vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    return apply_prefix(model, bottleneck=5, init="default", **options)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (3, 5, 7), (2, 1, 3, 7), (2, 65, 192)], ids=str)
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, ...], bias: bool) -> None:
    given = leaves(shape, (11, shape[-1]), (11,) if bias else None)
    out = by_onednn(*given)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
    expected = F.linear(*exact)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6 * shape[-1] ** 0.5)
    dout = random(*out.shape, seed=1)
    found = torch.autograd.grad(out, [x for x in given if x is not None], dout)
    wanted = torch.autograd.grad(expected, [x for x in exact if x is not None], dout.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one.double(), other, rtol=5e-6, atol=5e-5)


@needs_onednn
@pytest.mark.parametrize("chosen", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed_are_computed(chosen: tuple[bool, ...]) -> None:
    given = [
        x.requires_grad_(need) for x, need in zip((random(3, 7), random(4, 7), random(4)), chosen, strict=True)
    ]
    by_onednn(*given).sum().backward()
    assert [x.grad is not None for x in given] == list(chosen)


@needs_onednn
def test_memory_may_lie_in_any_order() -> None:
    x = random(6, 5, 9)
    for rows in (x[:, 0], x[:, 0].t().contiguous().t(), x[::2, :, :], x.transpose(0, 1), x[:1].expand(4, 5, 9)):
        for weight in (random(9, 4).t(), random(4, 18)[:, :9], random(4, 18)[:, ::2], random(1, 9).expand(4, 9)):
            torch.testing.assert_close(by_onednn(rows, weight), F.linear(rows, weight), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_the_operator_passes_opcheck() -> None:
    x, weight, bias = leaves((2, 3, 7), (11, 7), (11,))
    for inputs in ((x, weight, bias), (x, weight.detach(), None), (x.detach(), weight, bias.detach())):
        torch.library.opcheck(OPERATOR, inputs)


@needs_onednn
def test_second_derivatives() -> None:
    x, weight, bias = leaves((3, 7), (4, 7), (4,))

    def of(product) -> Tensor:
        (dx,) = torch.autograd.grad(product(x, weight, bias).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), weight)[0]

    torch.testing.assert_close(of(by_onednn), of(F.linear), rtol=1e-4, atol=1e-2)


@needs_onednn
@pytest.mark.parametrize(
    "dims", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (1, 2, 1), (0, 0, None)]
)
def test_vmap_of_values_and_gradients(dims: tuple[int | None, ...]) -> None:
    def arranged(x: Tensor, dim: int | None) -> Tensor:
        return x[0] if dim is None else x.movedim(0, dim)

    given = [arranged(x, d) for x, d in zip((random(3, 2, 5, 7), random(3, 4, 7), random(3, 4)), dims, strict=True)]

    def gradients(product):
        return vmap(grad(lambda *inputs: product(*inputs).sin().sum(), (0, 1, 2)), dims)

    torch.testing.assert_close(vmap(by_onednn, dims)(*given), vmap(F.linear, dims)(*given), rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(by_onednn)(*given), gradients(F.linear)(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    if dims[:2] != (None, None):
        without = vmap(by_onednn, dims[:2])(*given[:2])
        torch.testing.assert_close(without, vmap(F.linear, dims[:2])(*given[:2]), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.usefixtures("cpp_compiler")
def test_compiled_without_a_graph_break() -> None:
    given = leaves((6, 7), (4, 7), (4,))
    compiled = torch.compile(lambda *x: by_onednn(*x).relu().sum(), fullgraph=True)
    found = torch.autograd.grad(compiled(*given), given)
    for one, other in zip(found, torch.autograd.grad(F.linear(*given).relu().sum(), given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_what_onednn_does_not_gain_from_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedperfix_kernels.linear._multiply", lambda *_: pytest.fail("computed by oneDNN"))
    weight = random(4, 7)
    assert by_onednn(random(3, 7).double(), weight.double()).dtype is torch.float64
    assert by_onednn(random(3, 7).bfloat16(), weight.bfloat16()).dtype is torch.bfloat16
    assert by_onednn(random(0, 7), weight).shape == (0, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert by_onednn(random(3, 7), weight).dtype is torch.bfloat16


@needs_onednn
def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"x: got shape \(3, 6\), .*, takes shape \[..., C_in\] for a weight of \(4, 7\)"
    ):
        by_onednn(random(3, 6), random(4, 7))
    with pytest.raises(ValueError, match=r"bias: got shape \(1,\), .*, takes shape \[4\]"):
        by_onednn(random(3, 7), random(4, 7), random(1))


@needs_onednn
@pytest.mark.parametrize("options", [{}, {"mode": "additive"}, {"prefix": "tokens"}], ids=str)
def test_a_model_computes_the_same_and_keeps_its_names(options: dict) -> None:
    plain, chosen, images = vit(**options), vit(**options), random(3, 3, 8, 8)
    set_linear(chosen, "onednn")
    linears = [name for name, module in plain.named_modules() if type(module) is nn.Linear]
    assert linears == [name for name, module in chosen.named_modules() if type(module) is ChosenLinear]
    assert list(plain.state_dict()) == list(chosen.state_dict())
    for model in (plain, chosen):
        F.cross_entropy(model(images), torch.arange(3)).backward()
    torch.testing.assert_close(chosen(images), plain(images), rtol=1e-5, atol=1e-5)
    for (name, one), other in zip(chosen.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@needs_onednn
@pytest.mark.parametrize("options", [{}, {"mode": "additive"}], ids=str)
def test_every_product_of_a_model_is_onednns_and_torch_takes_them_back(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, calls = vit(**options), random(3, 3, 8, 8), []
    monkeypatch.setattr("fedperfix_kernels.nn.linear.F.linear", lambda *_: pytest.fail("computed by F.linear"))
    set_linear(model, "onednn")
    model.head.register_forward_hook(lambda *_: calls.append("hook"))
    model(images)
    assert calls == ["hook"]
    monkeypatch.undo()
    monkeypatch.setattr("fedperfix_kernels.linear._multiply", lambda *_: pytest.fail("computed by oneDNN"))
    set_linear(model, "torch")
    model(images)


@needs_onednn
@pytest.mark.usefixtures("cpp_compiler")
def test_a_chosen_model_can_be_copied_mapped_and_compiled() -> None:
    model, images = vit(backend="torch"), random(3, 3, 8, 8)
    set_linear(model, "onednn")
    expected = model(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    rows = {name: parameter.detach().expand(2, *parameter.shape) for name, parameter in model.named_parameters()}
    mapped = vmap(lambda own: functional_call(model, own, (images,)))(rows)
    torch.testing.assert_close(mapped[1], expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)


def test_torch_leaves_a_model_as_it_is() -> None:
    model = vit()
    set_linear(model, "torch")
    assert not any(isinstance(module, ChosenLinear) for module in model.modules())


LINUX = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 2\nmodel name\t: a processor\n"


@pytest.mark.parametrize(
    ("processor", "is_zen5"),
    [
        (LINUX.format("AuthenticAMD", 26), True),
        (LINUX.format("AuthenticAMD", 25), False),
        (LINUX.format("GenuineIntel", 26), False),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", True),
        ("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", False),
        ("AuthenticAMD", False),
        ("arm", False),
        ("", False),
    ],
)
def test_zen_5_is_told_from_others(processor: str, is_zen5: bool) -> None:
    assert _is_amd_from(26, processor) is is_zen5


@pytest.mark.parametrize(
    ("family", "capability", "mkl", "obstacle", "expected"),
    [
        (26, "AVX512", True, "", "onednn"),
        (26, "AVX512_BF16", True, "", "onednn"),
        (26, "AVX2", True, "", "torch"),
        (25, "AVX512", True, "", "torch"),
        (26, "AVX512", False, "", "torch"),
        (26, "AVX512", True, "it is not there", "torch"),
    ],
)
def test_auto_goes_by_the_processor_and_what_pytorch_has(
    family: int, capability: str, mkl: bool, obstacle: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedperfix_kernels.linear._processor", lambda: LINUX.format("AuthenticAMD", family))
    monkeypatch.setattr("fedperfix_kernels.linear.onednn_obstacle", lambda: obstacle)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert resolve_linear("auto") == expected


def test_a_choice_is_obeyed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_linear("torch") == "torch"
    monkeypatch.setattr("fedperfix_kernels.linear.onednn_obstacle", lambda: "this build has none")
    with pytest.raises(ValueError, match="linear: got 'onednn', but this build has none; use 'torch' or 'auto'"):
        set_linear(vit(), "onednn")
    with pytest.raises(ValueError, match="linear: got 'mkl', takes one of 'auto', 'torch', 'onednn'"):
        resolve_linear("mkl")
    with pytest.raises(ValueError, match="implementation: got 'auto', takes one of 'torch', 'onednn'"):
        set_linear(vit(), "auto")
