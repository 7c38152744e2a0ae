"""The weighted mean of K clients' ViT: the authors' style of loop, torch._foreach, torch.mv, ours."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import timm
import torch

from bench.comparison import Comparison, Plan, Results
from fedperfix_kernels import BlockLayout, aggregate


def aggregation_plans(device: torch.device) -> Iterator[Plan]:
    """One weight per client and one per client and layer, at sizes that fit the device."""
    if device.type == "cuda":
        sizes = [
            (name, clients)
            for name in ("vit_small_patch16_224", "vit_base_patch16_224")
            for clients in (8, 32, 128)
        ]
        dtypes = (torch.float32, torch.bfloat16)
    else:
        sizes = [("vit_tiny_patch16_224", 8), ("vit_small_patch16_224", 8), ("vit_tiny_patch16_224", 32)]
        dtypes = (torch.float32,)
    for name, clients in sizes:
        for dtype in dtypes:
            for per_layer in (False, True):
                title = (
                    f"aggregation {'per layer' if per_layer else 'per client'}, "
                    f"{str(dtype).removeprefix('torch.')}, {name}, K={clients}"
                )
                variants = ("loop", "torch._foreach", *(() if per_layer else ("torch.mv",)), "fedperfix")
                yield Plan(title, variants, partial(_comparison, title, name, clients, dtype, per_layer, device))


def _comparison(
    name: str, model: str, clients: int, dtype: torch.dtype, per_layer: bool, device: torch.device
) -> Comparison:
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in timm.create_model(model).named_parameters()}
    layout = BlockLayout.of(shapes)
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
