"""The aggregation of K clients' ViT: weighted mean, robust rules and int8 uploads, in plain PyTorch and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import timm
import torch
from torch import Tensor

from bench.comparison import Comparison, Plan, Results
from fedperfix_kernels import BlockLayout, Quantized, aggregate, clipped_mean, krum, median, quantize
from fedperfix_kernels.arena import BLOCK

_COLUMNS = 1 << 22  # the eager median and the exact results go through the uploads in pieces of this many columns


def aggregation_plans(device: torch.device) -> Iterator[Plan]:
    """The mean per client and per layer, then the other rules, at sizes that fit the device."""
    tiny, small, base = (f"vit_{size}_patch16_224" for size in ("tiny", "small", "base"))
    if device.type == "cuda":
        means = [(name, k, dtype) for name in (small, base) for k in (8, 32, 128) for dtype in _GPU_DTYPES]
        rules = [(rule, small, k, dtype) for rule in _RULES for k in (8, 32, 128) for dtype in _GPU_DTYPES]
    else:
        means = [(tiny, 8, torch.float32), (small, 8, torch.float32), (tiny, 32, torch.float32)]
        means.append((tiny, 8, torch.bfloat16))
        rules = [(rule, tiny, 8, torch.float32) for rule in ("median", "clipped mean", "Krum", "int8 mean")]
        rules += [(rule, tiny, 8, torch.bfloat16) for rule in ("median", "clipped mean")]
    for name, clients, dtype in means:
        for per_layer in (False, True):
            title = _title(f"per {'layer' if per_layer else 'client'}", name, clients, dtype)
            variants = ("loop", "torch._foreach", *(() if per_layer else ("torch.mv",)), "fedperfix")
            yield Plan(title, variants, partial(_comparison, title, name, clients, dtype, per_layer, device))
    for rule, name, clients, dtype in rules:
        if rule == "int8 mean" and dtype != torch.float32:
            continue  # the uploads are int8 and their mean is float32
        title = _title(rule, name, clients, dtype)
        build = partial(_rule_comparison, title, rule, name, clients, dtype, device)
        yield Plan(title, ("eager", "fedperfix"), build)


def _title(what: str, model: str, clients: int, dtype: torch.dtype) -> str:
    return f"aggregation {what}, {str(dtype).removeprefix('torch.')}, {model}, K={clients}"


def _layout(model: str) -> BlockLayout:
    with torch.device("meta"):
        return BlockLayout.of({name: x.shape for name, x in timm.create_model(model).named_parameters()})


def _comparison(
    name: str, model: str, clients: int, dtype: torch.dtype, per_layer: bool, device: torch.device
) -> Comparison:
    layout = _layout(model)
    generator = torch.Generator(device).manual_seed(0)
    uploads = torch.zeros(clients, layout.numel, dtype=dtype, device=device)
    for row in uploads:
        for view in layout.views(row).values():  # the padding between tensors stays zero, as in an arena
            view.copy_(torch.randn(view.shape, generator=generator, device=device))
    out = torch.empty(layout.numel, dtype=dtype, device=device)
    weights = (
        torch.rand(clients, layout.layers if per_layer else 1, generator=torch.Generator().manual_seed(0)) + 0.1
    )
    given = weights if per_layer else weights[:, 0]
    shares = (weights / weights.sum(0)).double()
    states = [layout.views(row) for row in uploads]
    column = {name: (i if per_layer else 0) for i, name in enumerate(layout.names)}

    def authors_loop(_: int) -> Results:
        """Per tensor and client: total += state[name] * weight, into a new tensor."""
        result = torch.zeros_like(out)
        views = layout.views(result)
        for name in layout.names:
            total = torch.zeros_like(states[0][name])
            for k, state in enumerate(states):
                total = total + state[name] * shares[k, column[name]].item()
            views[name].copy_(total)
        return (result,)

    def foreach(_: int) -> Results:
        torch._foreach_zero_(outputs)
        for k, state in enumerate(lists):
            if per_layer:
                scaled = torch._foreach_mul(state, shares[k].tolist())
                torch._foreach_add_(outputs, scaled)
            else:
                torch._foreach_add_(outputs, state, alpha=shares[k, 0].item())
        return (out_foreach,)

    def matrix_vector(_: int) -> Results:
        return (torch.mv(uploads.T, shares[:, 0].to(dtype).to(device), out=out_mv),)

    def ours(_: int) -> Results:
        return (aggregate(uploads, given, layout=layout if per_layer else None, out=out),)

    out_foreach, out_mv = torch.empty_like(out), torch.empty_like(out)
    outputs = list(layout.views(out_foreach).values())
    lists = [list(state.values()) for state in states]
    out_foreach.zero_()
    variants = {"loop": authors_loop, "torch._foreach": foreach}
    if not per_layer:
        variants["torch.mv"] = matrix_vector
    variants["fedperfix"] = ours

    def exact() -> Results:
        result = torch.zeros(layout.numel, dtype=torch.float64, device=device)
        views = layout.views(result)
        for name in layout.names:
            for k, state in enumerate(states):
                views[name] += state[name].double() * shares[k, column[name]].item()
        return (result,)

    return Comparison(
        name=name,
        variants=variants,
        input_sets=1,
        exact=exact,
        work=(clients + 1) * layout.numel * out.element_size(),
        unit="bytes",
        dtype=dtype,
        bytes_moved=(clients + 1) * layout.numel * out.element_size(),
        capturable=False,
        settings={"model": model, "clients": clients, "numel": layout.numel, "per_layer": per_layer},
    )


def _rule_comparison(
    name: str, rule: str, model: str, clients: int, dtype: torch.dtype, device: torch.device
) -> Comparison:
    """One rule over updates whose lengths differ, so that rounding does not change what Krum chooses."""
    numel = _layout(model).numel
    generator = torch.Generator(device).manual_seed(0)
    center = torch.randn(numel, generator=generator, device=device).to(dtype)
    uploads = torch.empty(clients, numel, dtype=dtype, device=device)
    for k, row in enumerate(uploads):
        row.copy_(center + (0.1 + k / clients) * torch.randn(numel, generator=generator, device=device))
    eager, ours, exact, moved = _RULES[rule](uploads, center)
    return Comparison(
        name=name,
        variants={"eager": lambda _: (eager(),), "fedperfix": lambda _: (ours(),)},
        input_sets=1,
        exact=lambda: (exact(),),
        work=moved,
        unit="bytes",
        dtype=dtype,
        bytes_moved=moved,
        capturable=False,
        settings={"model": model, "clients": clients, "numel": numel, "rule": rule},
    )


Rule = tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor], int]


def _median_rule(uploads: Tensor, _: Tensor) -> Rule:
    """Plain PyTorch, ours, the exact result, the fewest bytes: every upload and the result once."""
    clients, numel = uploads.shape

    def middle(rows: Tensor) -> Tensor:
        return rows.sort(0).values[(clients - 1) // 2 : clients // 2 + 1].mean(0)

    def eager() -> Tensor:
        return torch.cat([middle(piece) for piece in uploads.split(_COLUMNS, 1)])

    def exact() -> Tensor:
        return torch.cat([middle(piece.double()) for piece in uploads.split(_COLUMNS, 1)])

    out = torch.empty_like(uploads[0])
    return eager, lambda: median(uploads, out=out), exact, (clients + 1) * numel * out.element_size()


def _clipped_rule(uploads: Tensor, center: Tensor) -> Rule:
    """The same for the clipped mean: uploads and center twice, the result once."""
    clients, numel = uploads.shape
    max_norm = 0.6 * numel**0.5

    def clipped(rows: Tensor, model: Tensor, norms: Tensor) -> Tensor:
        scale = (max_norm / norms).clamp_max(1)[:, None].to(rows.dtype)
        return model + ((rows - model) * scale).mean(0)

    def eager() -> Tensor:
        return clipped(uploads, center, (uploads - center).float().norm(dim=1))

    def exact() -> Tensor:
        norms = torch.stack([(row.double() - center).norm() for row in uploads])
        pieces = zip(uploads.split(_COLUMNS, 1), center.split(_COLUMNS), strict=True)
        return torch.cat([clipped(rows.double(), model.double(), norms) for rows, model in pieces])

    out, weights = torch.empty_like(center), [1.0] * clients
    moved = (2 * clients + 3) * numel * out.element_size()
    return eager, lambda: clipped_mean(uploads, weights, center, max_norm, out=out), exact, moved


def _krum_rule(uploads: Tensor, center: Tensor) -> Rule:
    """The same for Multi-Krum: uploads and center once, the chosen quarter again, the result once."""
    clients, numel = uploads.shape
    byzantine, select = clients // 4, clients // 4

    def chosen(distances: Tensor) -> Tensor:
        nearest = distances.square().sort(1).values[:, 1 : clients - byzantine - 1]
        return nearest.sum(1).argsort()[:select]

    def eager() -> Tensor:
        updates = (uploads - center).float()
        return uploads[chosen(torch.cdist(updates, updates))].mean(0)

    def exact() -> Tensor:
        rows = [[(x.double() - y).norm() for y in uploads] for x in uploads]
        indices = chosen(torch.tensor(rows))
        return sum(uploads[k].double() for k in indices.tolist()) / select

    out = torch.empty_like(center)
    moved = (clients + select + 2) * numel * out.element_size()
    return eager, lambda: krum(uploads, center, byzantine, select, out=out)[0], exact, moved


def _int8_rule(uploads: Tensor, _: Tensor) -> Rule:
    """The same for the mean of int8 uploads: values and scales once, the result once in float32."""
    clients, numel = uploads.shape
    quantized = Quantized.stack([quantize(row) for row in uploads])
    weights = [1.0] * clients

    def mean(accumulate: torch.dtype) -> Tensor:
        total = torch.zeros(numel, dtype=accumulate, device=uploads.device)
        for values, scales in zip(quantized.values, quantized.scales, strict=True):
            total += values.to(accumulate) * scales.to(accumulate).repeat_interleave(BLOCK)
        return total / clients

    out = torch.empty(numel, dtype=torch.float32, device=uploads.device)
    moved = quantized.values.nbytes + quantized.scales.nbytes + out.nbytes
    return (
        partial(mean, torch.float32),
        lambda: aggregate(quantized, weights, out=out),
        partial(mean, torch.float64),
        moved,
    )


def _checked_rule(uploads: Tensor, _: Tensor) -> Rule:
    """The same for the mean that names non-finite uploads: everything once."""
    clients, numel = uploads.shape
    out, weights = torch.empty_like(uploads[0]), [1.0] * clients
    nonfinite = torch.empty(clients, dtype=torch.bool, device=uploads.device)

    def eager() -> Tensor:
        nonfinite.copy_(torch.stack([~row.isfinite().all() for row in uploads]))
        return uploads.mean(0)

    def exact() -> Tensor:
        return torch.cat([piece.double().mean(0) for piece in uploads.split(_COLUMNS, 1)])

    def ours() -> Tensor:
        return aggregate(uploads, weights, out=out, nonfinite=nonfinite)

    return eager, ours, exact, (clients + 1) * numel * out.element_size()


_GPU_DTYPES = (torch.float32, torch.bfloat16)
_RULES = {
    "median": _median_rule,
    "clipped mean": _clipped_rule,
    "Krum": _krum_rule,
    "int8 mean": _int8_rule,
    "checked mean": _checked_rule,
}
