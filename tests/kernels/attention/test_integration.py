"""Strides, autograd, torch.compile, autocast, checkpointing, opcheck, determinism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fedperfix_kernels import packed_prefix_attention, prefix_attention
from fedperfix_kernels.attention import MODES
from tests.kernels.attention.cases import NAMES, Case, each_mode, make_inputs, run

FUSED = ("triton", "native")
BACKENDS = (*FUSED, "torch", "reference")


def separate(inputs) -> list[Tensor]:
    """q, k, v, p_k, p_v and gate as contiguous leaves."""
    pieces = [*inputs.qkv.unbind(2), *inputs.prefix.unbind(2), inputs.gate]
    return [x.detach().clone().contiguous() for x in pieces]


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens before batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second element": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "inside a larger buffer": lambda x: torch.nn.functional.pad(x, (3, 5, 0, 0, 1, 2), value=torch.nan)[
        :, 1:-2, :, 3:-5
    ],
}


@pytest.mark.parametrize(("mode", "backend"), each_mode(FUSED))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_any_strides_give_the_same_result(mode: str, layout: str, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(2, 19, 3, 16), device, torch.float32)
    expected = run(inputs, mode, backend, packed=False)
    *tensors, gate = separate(inputs)
    leaves = [LAYOUTS[layout](x).requires_grad_() for x in tensors]
    assert all(torch.equal(leaf, x) for leaf, x in zip(leaves, tensors, strict=True))
    out = prefix_attention(*leaves, gate, mode=mode, backend=backend)
    gradients = torch.autograd.grad(out, leaves, inputs.dout)
    assert torch.equal(out, expected[0])
    assert torch.equal(torch.stack(gradients[:3], 2), expected[1])
    assert torch.equal(torch.stack(gradients[3:], 2), expected[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_expanded_inputs_and_gradients(mode: str, backend: str, device: torch.device) -> None:
    """Inputs expanded along the batch, and the stride-0 gradient that out.sum().backward() sends."""
    inputs = make_inputs(Case(1, 17, 2, 16), device, torch.float32)
    leaves = [x.requires_grad_() for x in separate(inputs)[:5]]
    expanded = [x.expand(3, -1, -1, -1) for x in leaves]
    out = prefix_attention(*expanded, inputs.gate, mode=mode, backend=backend)
    out.sum().backward()
    copies = [x.detach().repeat(3, 1, 1, 1).requires_grad_() for x in leaves]
    copied = prefix_attention(*copies, inputs.gate, mode=mode, backend="reference")
    copied.backward(torch.ones_like(copied))
    torch.testing.assert_close(out, copied, rtol=1e-5, atol=1e-5)
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad.sum(0, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_packed_and_separate_agree(mode: str, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(2, 17, 2, 16), device, torch.float32)
    for name, x, y in zip(NAMES, run(inputs, mode, backend), run(inputs, mode, backend, False), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(("mode", "backend"), each_mode(FUSED))
@pytest.mark.parametrize("wanted", range(6))
def test_only_the_gradients_that_are_needed(mode: str, wanted: int, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(2, 17, 2, 16), device, torch.float32)
    results = []
    for name in (backend, "reference"):
        arguments = separate(inputs)
        arguments[wanted].requires_grad_()
        out = prefix_attention(*arguments, mode=mode, backend=name)
        results.append(torch.autograd.grad(out, arguments[wanted], inputs.dout)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", [0.7, 1, "scalar", "one"])
def test_gate_as_number_and_tensor(gate, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(2, 9, 3, 16), device, torch.float32)
    value = {"scalar": torch.tensor(0.7, device=device), "one": torch.tensor([0.7], device=device)}.get(gate, gate)
    number = gate if isinstance(gate, (int, float)) else 0.7
    arguments = separate(inputs)[:5]
    per_head = torch.full((3,), float(number), device=device)
    out = prefix_attention(*arguments, value, backend=backend)
    assert torch.equal(out, prefix_attention(*arguments, per_head, backend=backend))


@pytest.mark.parametrize("backend", FUSED)
def test_a_scalar_gate_gets_the_sum_of_the_heads_gradients(backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(2, 9, 3, 16), device, torch.float32)
    gate = torch.tensor(0.7, device=device, requires_grad=True)
    per_head = torch.full((3,), 0.7, device=device, requires_grad=True)
    for value, name in ((gate, backend), (per_head, "reference")):
        packed_prefix_attention(inputs.qkv, inputs.prefix, value, backend=name).backward(inputs.dout)
    torch.testing.assert_close(gate.grad, per_head.grad.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mode", "backend"), each_mode(FUSED))
@pytest.mark.parametrize("shared", [False, True])
def test_the_same_input_gives_the_same_bits(mode: str, shared: bool, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(3, 33, 2, 16, shared=shared), device, torch.float32)
    first = run(inputs, mode, backend)
    for _ in range(3):
        for name, x, y in zip(NAMES, first, run(inputs, mode, backend), strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize(("mode", "backend"), each_mode(FUSED))
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(mode: str, shared: bool, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(2, 9, 2, 16, shared=shared), device, torch.float32)
    *tensors, gate = (x.requires_grad_() for x in separate(inputs))
    ops = torch.ops.fedperfix
    options = (gate, None, None, None, mode, 0.25, backend)
    torch.library.opcheck(ops.prefix_attention, (*tensors, *options))
    packed = (inputs.qkv.requires_grad_(), inputs.prefix.requires_grad_(), *options)
    torch.library.opcheck(ops.packed_prefix_attention, packed)
    with torch.no_grad():
        out, lse = ops.packed_prefix_attention(*packed)
        frozen = [x.detach() for x in (*inputs.qkv.unbind(2), *inputs.prefix.unbind(2), gate)]
        for need_prefix in (True, False):
            arguments = (inputs.dout, out, lse, *frozen, *options[1:], need_prefix, False)
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(ops.prefix_attention_backward, arguments, test_utils=tests)


@pytest.mark.parametrize(("mode", "backend"), each_mode(FUSED))
def test_opcheck_with_everything(mode: str, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(4, 9, 2, 16), device, torch.float32)
    index = torch.tensor([1, 0, 1, 1], device=device)
    gate = torch.rand(2, 2, device=device)
    key_mask = torch.rand(4, 9, device=device) > 0.3
    bias = torch.randn(2, 2, 9, 9, device=device)
    options = (gate, bias, key_mask, index, mode, 0.25, backend)
    qkv, prefix = inputs.qkv, inputs.prefix[:2]
    ops, tests = torch.ops.fedperfix, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.packed_prefix_attention, (qkv, prefix, *options), test_utils=tests)
    out, lse = ops.packed_prefix_attention(qkv, prefix, *options)
    arguments = (inputs.dout, out, lse, *qkv.unbind(2), *prefix.unbind(2), *options, True, True)
    torch.library.opcheck(ops.prefix_attention_backward, arguments, test_utils=tests)


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.parametrize(("mode", "backend"), each_mode(BACKENDS))
def test_torch_compile_without_graph_breaks(mode: str, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(2, 17, 2, 16), device, torch.float32)
    compiler = "inductor" if backend in ("native", "torch") else "aot_eager"

    def function(qkv: Tensor, prefix: Tensor, gate: Tensor) -> Tensor:
        return packed_prefix_attention(qkv, prefix, gate, mode=mode, backend=backend)

    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in (inputs.qkv, inputs.prefix, inputs.gate)]
    compiled = torch.compile(function, fullgraph=True, backend=compiler)(*leaves)
    gradients = torch.autograd.grad(compiled, leaves, inputs.dout)
    expected = run(inputs, mode, backend)
    for name, x, y in zip(NAMES, (compiled, *gradients), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("packed", [True, False])
def test_torch_compile_of_a_pass_without_gradients(packed: bool, backend: str, device: torch.device) -> None:
    """Dynamo traces the function's `forward` itself where nothing wants a gradient, as in evaluation."""
    inputs = make_inputs(Case(2, 17, 2, 16), device, torch.float32)
    arguments = (inputs.qkv, inputs.prefix, inputs.gate) if packed else separate(inputs)
    attend = packed_prefix_attention if packed else prefix_attention
    torch._dynamo.reset()
    function = torch.compile(lambda *x: attend(*x, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(*arguments), attend(*arguments, backend=backend))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("compiled", [False, True])
def test_functional_gradients_are_right_or_refused(compiled: bool, backend: str, device: torch.device) -> None:
    """torch.func.grad, which once gave zeros under torch.compile where the gradient was registered elsewhere."""
    inputs = make_inputs(Case(1, 9, 1, 16), device, torch.float32)

    def loss(qkv: Tensor) -> Tensor:
        return (packed_prefix_attention(qkv, inputs.prefix, inputs.gate, backend=backend) * inputs.dout).sum()

    gradient = torch.func.grad(loss)
    if compiled:
        torch._dynamo.reset()
        gradient = torch.compile(gradient, backend="aot_eager")
    try:
        found = gradient(inputs.qkv)
    except TorchDynamoException:  # PyTorch 2.11 cannot trace it, and says so
        assert compiled
        return
    torch.testing.assert_close(found, run(inputs, "gated", "reference")[1], rtol=1e-4, atol=1e-5)


VMAPPED = {
    "one prefix for each copy": {"prefix": (3, 2), "gate": ()},
    "a prefix that all copies share": {"prefix": (2,), "gate": ()},
    "a prefix shared by each copy's batch": {"prefix": (3, 1), "gate": ()},
    "one gate for each copy": {"prefix": (3, 2), "gate": (3,)},
    "a shared prefix and one gate for each copy": {"prefix": (1,), "gate": (3,)},
}


@pytest.mark.parametrize(("mode", "backend"), each_mode(BACKENDS))
@pytest.mark.parametrize("case", VMAPPED)
def test_vmap_of_grad_equals_a_loop(case: str, mode: str, backend: str, device: torch.device) -> None:
    """Per-copy gradients, as per-client models stacked along a new dimension need them."""
    generator = torch.Generator().manual_seed(0)
    sizes = VMAPPED[case]
    qkv = torch.randn(3, 2, 9, 3, 2, 16, generator=generator).to(device)
    prefix = torch.randn(*sizes["prefix"], 9, 2, 2, 16, generator=generator).to(device)
    gate = (torch.rand(*sizes["gate"], 2, generator=generator) + 0.5).to(device)
    dims = (0, 0 if prefix.dim() == 6 else None, 0 if gate.dim() == 2 else None)

    def loss(qkv: Tensor, prefix: Tensor, gate: Tensor) -> Tensor:
        return packed_prefix_attention(qkv, prefix, gate, mode=mode, backend=backend).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), dims)(qkv, prefix, gate)
    for copy in range(3):
        arguments = [x if dim is None else x[copy] for x, dim in zip((qkv, prefix, gate), dims, strict=True)]
        for found, expected in zip(gradients, torch.func.grad(loss, (0, 1, 2))(*arguments), strict=True):
            torch.testing.assert_close(found[copy], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", ["gated", "concat"])
def test_vmap_of_grad_without_prefix_keys(mode: str, backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 2, 9, 3, 2, 16, generator=generator).to(device)
    prefix, gate = qkv.new_empty(3, 2, 0, 2, 2, 16), torch.rand(3, 2, generator=generator).to(device)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        def loss(*inputs: Tensor) -> Tensor:
            return packed_prefix_attention(*inputs, mode=mode, backend=backend).square().sum()

        return torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(qkv, prefix, gate)

    for found, expected in zip(gradients(backend), gradients("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("biased", [True, False])
def test_vmap_with_bias_key_mask_and_table(biased: bool, backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 4, 9, 3, 2, 16, generator=generator).to(device)
    table = torch.randn(5, 9, 2, 2, 16, generator=generator).to(device)
    gates = torch.rand(5, 2, generator=generator).to(device)
    bias = torch.randn(2, 2, 9, 9, generator=generator).to(device) if biased else None
    key_mask = torch.rand(3, 4, 9, generator=generator).to(device) > 0.3
    index = torch.randint(5, (3, 4), generator=generator).to(device)

    def attend(qkv: Tensor, key_mask: Tensor, index: Tensor) -> Tensor:
        return packed_prefix_attention(
            qkv, table, gates, bias=bias, key_mask=key_mask, prefix_index=index, backend=backend
        )

    together = torch.func.vmap(attend)(qkv, key_mask, index)
    apart = torch.stack([attend(*one) for one in zip(qkv, key_mask, index, strict=True)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(1, 5, 1, 16), device, torch.float32)
    qkv = inputs.qkv.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no second derivative on a GPU
        out = packed_prefix_attention(qkv, inputs.prefix, inputs.gate, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    if backend in FUSED:
        with pytest.raises((NotImplementedError, RuntimeError), match="derivative|not have been used"):
            torch.autograd.grad(gradient.square().sum(), qkv)
        return
    (second,) = torch.autograd.grad(gradient.square().sum(), qkv)
    exact = inputs.to(torch.float64)
    leaf = exact.qkv.detach().requires_grad_()
    out = packed_prefix_attention(leaf, exact.prefix, exact.gate, backend="reference")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), leaf)
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_autocast_casts_like_scaled_dot_product_attention(mode: str, backend: str, device: torch.device) -> None:
    """float16 under autocast equals float16 by hand, and gradients come back in the inputs' own dtype."""
    inputs = make_inputs(Case(2, 17, 2, 16), device, torch.float32)
    leaves = [x.requires_grad_() for x in (inputs.qkv, inputs.prefix, inputs.gate)]
    with torch.autocast(device.type, dtype=torch.float16):
        out = packed_prefix_attention(*leaves, mode=mode, backend=backend)
    assert out.dtype == torch.float16
    gradients = torch.autograd.grad(out, leaves, inputs.dout.half())
    assert [x.dtype for x in gradients] == [torch.float32] * 3
    by_hand = packed_prefix_attention(
        inputs.qkv.half(), inputs.prefix.half(), inputs.gate, mode=mode, backend=backend
    )
    assert torch.equal(out, by_hand)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(2, 17, 2, 16), device, torch.float32)
    leaves = [x.requires_grad_() for x in (inputs.qkv, inputs.prefix, inputs.gate)]

    def function(qkv: Tensor, prefix: Tensor, gate: Tensor) -> Tensor:
        return packed_prefix_attention(qkv, prefix, gate, backend=backend)

    out = checkpoint(function, *leaves, use_reentrant=reentrant)
    out.backward(inputs.dout)
    for leaf, expected in zip(leaves, run(inputs, "gated", backend)[1:], strict=True):
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend: str, device: torch.device) -> None:
    qkv = torch.zeros(0, 17, 3, 2, 16, device=device, requires_grad=True)
    prefix = torch.zeros(0, 17, 2, 2, 16, device=device, requires_grad=True)
    out = packed_prefix_attention(qkv, prefix, 1.0, backend=backend)
    assert out.shape == (0, 17, 2, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_are_not_hidden(backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(2, 17, 2, 16, 5), device, torch.float32)
    inputs.prefix[1, 2, 0, 1, 3] = torch.nan
    out = run(inputs, "gated", backend)[0]
    assert out[1, :, 1].isnan().all()
    assert out[0].isfinite().all()
    assert out[1, :, 0].isfinite().all()


@pytest.mark.parametrize("backend", FUSED)
def test_nothing_large_is_saved_for_backward(backend: str, device: torch.device) -> None:
    """The packed inputs, out and two rows of log-sum-exps: no [N, N] tensor, no copy of q, k or v."""
    inputs = make_inputs(Case(1, 129, 1, 16), device, torch.float32)
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = [x.requires_grad_() for x in (inputs.qkv, inputs.prefix, inputs.gate)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = packed_prefix_attention(*leaves, backend=backend)
    expected = sum(x.nbytes for x in leaves) + out.nbytes + 2 * 129 * 4
    assert sum(saved.values()) == expected
