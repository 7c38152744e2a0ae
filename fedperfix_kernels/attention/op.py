"""The fused implementations as PyTorch operators, so that autograd, torch.compile, vmap and opcheck know it.

Two forward operators share one backward operator: `prefix_attention` takes q, k, v, p_k, p_v apart, and
`packed_prefix_attention` takes the outputs of the two projections as they are, so that their gradients are
written once, already packed.

The gradient formulas are attached three times. `apply` is what users call. In eager training it takes a plain
autograd.Function, which costs least per call; under `torch.func` and `torch.compile` one with a `setup_context`.
The same formulas are registered on the operators, for `torch.ops` and tracing; without that,
`torch.compile(torch.func.grad(...))` would silently return zeros.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedperfix_kernels.attention import native_launch
from fedperfix_kernels.attention.inputs import Inputs
from fedperfix_kernels.autograd import eager_function, is_eager, wants_derivative

_library = torch.library.Library("fedperfix", "FRAGMENT")
_OPTIONS = (
    "Tensor gate, Tensor? bias, Tensor? key_mask, Tensor? prefix_index, str mode, float scale, str implementation"
)
_library.define(
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
    f"{_OPTIONS}) -> (Tensor, Tensor)"
)
_library.define(f"packed_prefix_attention(Tensor qkv, Tensor prefix, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    "prefix_attention_backward(Tensor dout, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor prefix_k, "
    f"Tensor prefix_v, {_OPTIONS}, bool need_prefix, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _launch(implementation: str) -> Any:
    """The module that allocates and runs the kernels: of `triton` or `native`."""
    if implementation == "native":
        return native_launch
    from fedperfix_kernels.attention import triton_launch  # only here: triton may not be installed

    return triton_launch


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    *inputs, implementation = given
    return _launch(implementation).forward(Inputs(*inputs))


def _packed_forward(qkv: Tensor, prefix: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _forward(*qkv.unbind(2), *prefix.unbind(2), *options)


def _backward(dout: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, implementation, need_prefix, need_bias = given
    if dout.stride(-1) != 1:  # for example the expanded gradient of out.sum()
        dout = dout.contiguous()
    return _launch(implementation).backward(dout, Inputs(*inputs), out, lse, need_prefix, need_bias)


for _name, _function in (
    ("prefix_attention", _forward),
    ("packed_prefix_attention", _packed_forward),
    ("prefix_attention_backward", _backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


# Shapes without data ------------------------------------------------------------------------------------------


@torch.library.register_fake("fedperfix::prefix_attention")
def _fake_forward(q, k, v, prefix_k, prefix_v, gate, bias, key_mask, prefix_index, mode, scale, implementation):
    batch, tokens, heads, _ = q.shape
    branches = 2 if mode == "gated" else 1
    return q.new_empty(q.shape), gate.new_empty((branches, batch, heads, tokens))


@torch.library.register_fake("fedperfix::packed_prefix_attention")
def _fake_packed_forward(qkv, prefix, *options):
    return _fake_forward(*qkv.unbind(2), *prefix.unbind(2), *options)


@torch.library.register_fake("fedperfix::prefix_attention_backward")
def _fake_backward(
    dout,
    out,
    lse,
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    gate,
    bias,
    key_mask,
    prefix_index,
    mode,
    scale,
    implementation,
    need_prefix,
    need_bias,
):
    batch, tokens, heads, head_dim = q.shape
    prefix_shape = prefix_k.shape[:2] if need_prefix else (0, 0)
    return (
        q.new_empty((batch, tokens, 3, heads, head_dim)),
        q.new_empty((*prefix_shape, 2, heads, head_dim)),
        gate.new_empty(gate.shape if need_prefix else (0,)),
        gate.new_empty(bias.shape if need_bias else (0,)),
    )


# Gradients ----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.mode, ctx.scale, ctx.implementation = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 12
    out, lse, *tensors = ctx.saved_tensors
    need_prefix, need_bias = any(ctx.needs_input_grad[3:6]), ctx.needs_input_grad[6]
    dqkv, dprefix, dgate, dbias = torch.ops.fedperfix.prefix_attention_backward(
        dout, out, lse, *tensors, ctx.mode, ctx.scale, ctx.implementation, need_prefix, need_bias
    )
    dprefix_k, dprefix_v, dgate = (*dprefix.unbind(2), dgate) if need_prefix else (None, None, None)
    dbias = dbias.to(tensors[6].dtype) if need_bias else None
    return *dqkv.unbind(2), dprefix_k, dprefix_v, dgate, dbias, None, None, None, None, None


def _packed_gradients(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    out, lse, qkv, prefix, *options = ctx.saved_tensors
    need_prefix, need_bias = any(ctx.needs_input_grad[1:3]), ctx.needs_input_grad[3]
    dqkv, dprefix, dgate, dbias = torch.ops.fedperfix.prefix_attention_backward(
        dout, out, lse, *qkv.unbind(2), *prefix.unbind(2), *options,
        ctx.mode, ctx.scale, ctx.implementation, need_prefix, need_bias,
    )  # fmt: skip
    dprefix, dgate = (dprefix, dgate) if need_prefix else (None, None)
    dbias = dbias.to(options[1].dtype) if need_bias else None
    return dqkv, dprefix, dgate, dbias, None, None, None, None, None


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "prefix attention's fused backward has no derivative of its own; for second derivatives use "
        "backend='reference'"
    )


def _without_grad() -> AbstractContextManager[None]:
    """`torch.no_grad()` in a forward pass, since torch.func leaves gradients on there.

    Not while Dynamo traces: it runs a forward pass in place of the function where it sees no gradient wanted, also
    within `torch.func.grad`, which must then find the operator's own formula.
    """
    return nullcontext() if torch.compiler.is_compiling() else torch.no_grad()


# The forward passes name their parameters: to one with *inputs, Dynamo would pass a context as well.


class PrefixAttentionFunction(torch.autograd.Function):
    """`torch.ops.fedperfix.prefix_attention` for autograd and torch.func; returns (out, lse)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, prefix_k, prefix_v, gate, bias, key_mask, prefix_index, mode, scale, implementation):
        with _without_grad():
            return torch.ops.fedperfix.prefix_attention(
                q, k, v, prefix_k, prefix_v, gate, bias, key_mask, prefix_index, mode, scale, implementation
            )

    setup_context = staticmethod(_save)
    backward = staticmethod(once_differentiable(_gradients))


class PackedPrefixAttentionFunction(torch.autograd.Function):
    """`torch.ops.fedperfix.packed_prefix_attention` for autograd and torch.func; returns (out, lse)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(qkv, prefix, gate, bias, key_mask, prefix_index, mode, scale, implementation):
        with _without_grad():
            return torch.ops.fedperfix.packed_prefix_attention(
                qkv, prefix, gate, bias, key_mask, prefix_index, mode, scale, implementation
            )

    setup_context = staticmethod(_save)
    backward = staticmethod(once_differentiable(_packed_gradients))


# Each operator, and its gradients in eager training and under torch.func and torch.compile.
_SEPARATE = torch.ops.fedperfix.prefix_attention.default
_PACKED = torch.ops.fedperfix.packed_prefix_attention.default
_FUNCTIONS = {
    operator: (eager_function(functional.__name__, operator, _save, once_differentiable(gradients)), functional)
    for operator, gradients, functional in (
        (_SEPARATE, _gradients, PrefixAttentionFunction),
        (_PACKED, _packed_gradients, PackedPrefixAttentionFunction),
    )
}


def apply(*arguments: Any, packed: bool) -> Tensor:
    """Call a forward operator so that gradients flow through it, in whatever way PyTorch computes.

    Args:
        arguments: all of `prefix_attention`, or of `packed_prefix_attention`.
        packed: which of the two.

    Returns:
        out [B, N, H, D].
    """
    operator = _PACKED if packed else _SEPARATE
    eager, functional = _FUNCTIONS[operator]
    if not is_eager():
        return functional.apply(*arguments)[0]
    return (eager.apply if wants_derivative() else operator)(*arguments)[0]


torch.library.register_autograd("fedperfix::prefix_attention", _gradients, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "fedperfix::packed_prefix_attention", _packed_gradients, setup_context=_save, lib=_library
)
torch.library.register_autograd("fedperfix::prefix_attention_backward", _no_second_derivative, lib=_library)


# vmap: the mapped dimension joins the batch -------------------------------------------------------------------


class _Folding:
    """Joins a mapped dimension of `size` V to the batch: image b of copy v becomes image v·B + b.

    That is a view where the mapped dimension comes first. With a bias image b of copy v becomes image b·V + v
    (`inside`), which keeps `bias[b mod G]`: the copies of the biases are G·V, and
    (b·V + v) mod G·V = (b mod G)·V + v.
    """

    def __init__(self, size: int, inside: bool) -> None:
        self.size, self.inside = size, inside

    def place(self, at: int = 0) -> int:
        """Where the mapped dimension is, of the two that are joined as dimension `at`."""
        return at + 1 if self.inside else at

    def join(self, x: Tensor | None, dim: int | None, at: int = 0) -> Tensor | None:
        """[..., B·V, ...] from a tensor with (or, at None, without) the mapped dimension; B is dimension `at`."""
        if x is None:
            return None
        place = self.place(at)
        if dim is None:
            x = x.unsqueeze(place).expand(*x.shape[:place], self.size, *x.shape[place:])
        else:
            x = x.movedim(dim, place)
        return x.flatten(at, at + 1)

    def part(self, x: Tensor, at: int = 0) -> Tensor:
        """The inverse of `join`: the mapped dimension is at `place(at)` of the result.

        A gradient that nobody wants is empty and stays as it is.
        """
        if x.shape[at] == 0:
            return x
        sizes = (x.shape[at] // self.size, self.size)
        return x.unflatten(at, sizes if self.inside else sizes[::-1])

    def options(
        self, batch: int, rows: int, values: tuple[Any, ...], dims: tuple[Any, ...], gate_per_copy: bool = False
    ) -> list[Tensor | None]:
        """gate, bias, key_mask, prefix_index of the joined batch.

        Args:
            batch, rows: B, and how many prefixes there are, both of one copy.
            values, dims: the four as given, and their mapped dimensions.
            gate_per_copy: give each copy a gate of its own even if all share one, as its gradient needs it.
        """
        gate, bias, key_mask, prefix_index = values
        gate_dim, bias_dim, mask_dim, index_dim = dims
        copies = torch.arange(self.size, device=gate.device)
        copy = copies.repeat(batch) if self.inside else copies.repeat_interleave(batch)  # of each image
        if gate_per_copy and gate_dim is None:
            gate, gate_dim = gate.expand(self.size, *gate.shape), 0
        if prefix_index is not None:
            prefix_index = self.join(prefix_index, index_dim)
            prefix_index = prefix_index * self.size + copy if self.inside else prefix_index + copy * rows
        elif rows == 1 and batch > 1:
            prefix_index = copy
        elif gate_dim is not None:
            prefix_index = torch.arange(batch * self.size, device=gate.device)
        if gate_dim is not None:  # a row for each row of the prefix table
            gate = gate.movedim(gate_dim, 0)
            if gate.dim() == 2:
                gate = gate[:, None].expand(-1, rows, -1)
            gate = self.join(gate, 0)
        elif gate.dim() == 2:
            gate = self.join(gate, None)
        joined = [gate, self.join(bias, bias_dim), self.join(key_mask, mask_dim), prefix_index]
        return [None if x is None else x.contiguous() for x in joined]


@torch.library.register_vmap("fedperfix::prefix_attention", lib=_library)
def _vmap_forward(info, in_dims, q, k, v, prefix_k, prefix_v, *options):
    folding = _Folding(info.batch_size, inside=options[1] is not None)
    tensors = [folding.join(x, dim) for x, dim in zip((q, k, v, prefix_k, prefix_v), in_dims[:5], strict=True)]
    rows = tensors[3].shape[0] // info.batch_size
    joined = folding.options(tensors[0].shape[0] // info.batch_size, rows, options[:4], in_dims[5:9])
    out, lse = torch.ops.fedperfix.prefix_attention(*_readable(*tensors), *joined, *options[4:])
    return (folding.part(out), folding.part(lse, 1)), (folding.place(), folding.place(1))


@torch.library.register_vmap("fedperfix::packed_prefix_attention", lib=_library)
def _vmap_packed(info, in_dims, qkv, prefix, *options):
    folding = _Folding(info.batch_size, inside=options[1] is not None)
    qkv, prefix = folding.join(qkv, in_dims[0]), folding.join(prefix, in_dims[1])
    rows = prefix.shape[0] // info.batch_size
    joined = folding.options(qkv.shape[0] // info.batch_size, rows, options[:4], in_dims[2:6])
    out, lse = torch.ops.fedperfix.packed_prefix_attention(*_readable(qkv, prefix), *joined, *options[4:])
    return (folding.part(out), folding.part(lse, 1)), (folding.place(), folding.place(1))


@torch.library.register_vmap("fedperfix::prefix_attention_backward", lib=_library)
def _vmap_backward(info, in_dims, dout, out, lse, q, k, v, prefix_k, prefix_v, *options):
    folding = _Folding(info.batch_size, inside=options[1] is not None)
    dout, out = folding.join(dout, in_dims[0]), folding.join(out, in_dims[1]).contiguous()
    lse = folding.join(lse, in_dims[2], 1).contiguous()
    tensors = [folding.join(x, dim) for x, dim in zip((q, k, v, prefix_k, prefix_v), in_dims[3:8], strict=True)]
    rows = tensors[3].shape[0] // info.batch_size
    batch, need_prefix = tensors[0].shape[0] // info.batch_size, options[7]
    joined = folding.options(batch, rows, options[:4], in_dims[8:12], gate_per_copy=need_prefix)
    dqkv, dprefix, dgate, dbias = torch.ops.fedperfix.prefix_attention_backward(
        dout, out, lse, *_readable(*tensors), *joined, *options[4:]
    )
    one_gate = options[0].dim() - (in_dims[8] is not None) == 1
    dgate, gate_place = folding.part(dgate), folding.place()
    if need_prefix and one_gate:  # its rows were copies of one gate
        dgate, gate_place = dgate.sum(1 - gate_place), 0
    places = (folding.place(), folding.place(), gate_place, folding.place())
    there = (True, need_prefix, need_prefix, options[8])
    dims = tuple(place if given else None for place, given in zip(places, there, strict=True))
    return (folding.part(dqkv), folding.part(dprefix), dgate, folding.part(dbias)), dims


def _readable(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


from fedperfix_kernels.attention import flops  # noqa: E402, F401  (registers formulas on the operators above)
