"""All parameters and running statistics of a model as views of one flat buffer, shared part first.

    flat = [ shared parameters | shared statistics | local statistics | local parameters ]

A client's upload is then one contiguous slice, loading a new global model is one copy, and an optimizer can
update the whole model in one call (in two where there are statistics, which it must not touch). Every tensor starts
on a block boundary, so that a block of the aggregation kernel belongs to one tensor; the padding between tensors is
zero and stays zero. Frozen parameters stay outside of the buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedperfix_kernels.checks import describe, message

# Elements per block: 4 KiB of float32, at most that much padding per tensor.
BLOCK = 1024


@dataclass(frozen=True)
class BlockLayout:
    """Where each named tensor lies in a flat buffer whose tensors start on block boundaries.

    Args:
        names: one per tensor, in order.
        shapes: shape of each tensor.
        offsets: first element of each tensor, a multiple of `BLOCK`.
        numel: elements of the whole buffer, padding included.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    offsets: tuple[int, ...]
    numel: int

    @classmethod
    def of(cls, shapes: dict[str, torch.Size]) -> BlockLayout:
        """Lay tensors of these shapes out one after the other."""
        offsets, end = [], 0
        for shape in shapes.values():
            offsets.append(end)
            end += -(-shape.numel() // BLOCK) * BLOCK
        return cls(tuple(shapes), tuple(shapes.values()), tuple(offsets), end)

    @property
    def layers(self) -> int:
        """How many tensors there are; per-layer weights have one column for each."""
        return len(self.names)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors as views of `flat` [numel]."""
        if flat.dim() != 1 or flat.shape[0] != self.numel:
            raise ValueError(message("flat", describe(flat), f"shape ({self.numel},)"))
        return {
            name: flat[start : start + shape.numel()].view(shape)
            for name, shape, start in zip(self.names, self.shapes, self.offsets, strict=True)
        }

    def row_views(self, rows: Tensor) -> dict[str, Tensor]:
        """The named tensors of every row of `rows` [K, numel], as views [K, *shape]."""
        return {
            name: rows[:, start : start + shape.numel()].unflatten(1, shape) if shape else rows[:, start]
            for name, shape, start in zip(self.names, self.shapes, self.offsets, strict=True)
        }

    def block_layer(self, device: torch.device) -> Tensor:
        """The tensor's index of every block: int32 [numel / BLOCK], kept per device."""
        return _block_layer(self, device)


@functools.lru_cache(maxsize=32)
def _block_layer(layout: BlockLayout, device: torch.device) -> Tensor:
    ends = (*layout.offsets[1:], layout.numel)
    blocks = torch.tensor([end - start for start, end in zip(layout.offsets, ends, strict=True)]) // BLOCK
    return torch.repeat_interleave(torch.arange(layout.layers, dtype=torch.int32), blocks).to(device)


class ParameterArena:
    """Keeps a model's parameters and statistics in one flat buffer, the shared ones before the local ones.

    Args:
        model: its parameters and `running_statistics` become views of the buffer; names, shapes, values and
            `requires_grad` stay.
        local: names (of `state_names(model)`) of the parameters and statistics that are not shared.
        frozen: names of parameters that nobody trains or sends: they stay where they are, without gradient.

    Attributes:
        flat: [P] the whole buffer; `shared` [P_shared] and `local` [P_local] are its two contiguous parts.
        layout, shared_layout, local_layout: where each tensor lies in them.
        frozen: the frozen parameters by name.
        statistics: where the statistics lie in `flat`; empty if the model has none.
        gradients: [P] after `attach_gradients`, else None; zero for statistics.

    Raises:
        ValueError: an unknown name, no parameters that are not frozen, or tensors of several dtypes or devices.
    """

    def __init__(self, model: nn.Module, local: Iterable[str] = (), frozen: Iterable[str] = ()) -> None:
        parameters = dict(model.named_parameters())  # tied parameters appear once
        self.frozen = _take_frozen(parameters, frozen)
        statistics = running_statistics(model)
        tensors: dict[str, Tensor] = {**parameters, **statistics}
        local_names = set(local)
        _check_tensors(parameters, tensors, local_names)
        parts = [
            {name: x.shape for name, x in some.items() if (name in local_names) == is_local}
            for some, is_local in ((parameters, False), (statistics, False), (statistics, True), (parameters, True))
        ]
        shapes = {name: shape for part in parts for name, shape in part.items()}

        self.layout = BlockLayout.of(shapes)
        self.shared_layout = BlockLayout.of(parts[0] | parts[1])
        self.local_layout = BlockLayout.of(parts[2] | parts[3])
        start = BlockLayout.of(parts[0]).numel
        self.statistics = slice(start, start + BlockLayout.of(parts[1] | parts[2]).numel)
        first = next(iter(parameters.values()))
        self.flat = torch.zeros(self.layout.numel, dtype=first.dtype, device=first.device)
        self.shared = self.flat[: self.shared_layout.numel]
        self.local = self.flat[self.shared_layout.numel :]
        self.gradients: Tensor | None = None
        self._tensors = {name: tensors[name] for name in shapes}
        for name, view in self.layout.views(self.flat).items():
            view.copy_(tensors[name].detach())
            tensors[name].data = view

    def trained(self, part: str = "all") -> tuple[slice, ...]:
        """Where in `flat` the parameters lie, without statistics: of `all`, the `shared` or the `local` part."""
        shared, local = slice(0, self.statistics.start), slice(self.statistics.stop, self.flat.numel())
        if part != "all":
            return ({"shared": shared, "local": local}[part],)
        if shared.stop == local.start:
            return (slice(0, local.stop),)
        return tuple(chosen for chosen in (shared, local) if chosen.start < chosen.stop)

    def load_parameters(self, flat: Tensor) -> None:
        """Copy the parameters of another flat buffer [P] into this one, and leave the statistics as they are."""
        for chosen in self.trained():
            self.flat[chosen] = flat[chosen]

    def attach_gradients(self) -> Tensor:
        """Give every trainable parameter a `.grad` that is a view of one flat buffer, and return that buffer [P].

        Autograd then adds into the buffer; set it to zero with `zero_gradients`, never with `set_to_none`.
        """
        if self.gradients is None:
            self.gradients = torch.zeros_like(self.flat)
        for name, view in self.layout.views(self.gradients).items():
            tensor = self._tensors[name]
            tensor.grad = view if tensor.requires_grad else None
        return self.gradients

    def zero_gradients(self) -> None:
        """Set the flat gradient buffer to zero in one call."""
        if self.gradients is not None:
            self.gradients.zero_()

    def check(self) -> None:
        """Raise RuntimeError if a tensor is no longer a view of the buffer (after `model.to(...)`, for one)."""
        for name, view in self.layout.views(self.flat).items():
            tensor = self._tensors[name]
            if tensor.data_ptr() != view.data_ptr() or tensor.device != view.device:
                kind = "parameter" if isinstance(tensor, nn.Parameter) else "statistic"
                raise RuntimeError(
                    f"ParameterArena: {kind} '{name}' no longer lies in the flat buffer; move or cast the "
                    "model before building the arena, and assign values in place"
                )


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running means and variances of a model's norm layers, by name.

    They change without a gradient, in every forward pass in training. Other buffers are constants (a fixed gate,
    Swin's masks) or counters (`num_batches_tracked`).
    """
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


def state_names(model: nn.Module) -> tuple[str, ...]:
    """Names of a model's parameters and `running_statistics`, module by module, a module's statistics last."""
    names = {name for name, _ in model.named_parameters()} | running_statistics(model).keys()
    ordered = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in (*module._parameters, *module._buffers)
    ]
    return tuple(name for name in ordered if name in names)


def _take_frozen(parameters: dict[str, nn.Parameter], frozen: Iterable[str]) -> dict[str, Tensor]:
    """Take the frozen ones out of `parameters`."""
    names = dict.fromkeys(frozen)
    unknown = sorted(names.keys() - parameters.keys())
    if unknown:
        raise ValueError(message("frozen", ", ".join(unknown), "names of the model's parameters"))
    return {name: parameters.pop(name).requires_grad_(False) for name in names}


def _check_tensors(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], local: set[str]) -> None:
    if not parameters:
        takes = "a module with at least one that is not frozen"
        raise ValueError(message("model", "a module without parameters", takes))
    unknown = sorted(local - tensors.keys())
    if unknown:
        raise ValueError(message("local", ", ".join(unknown), "names of the model's parameters and statistics"))
    kinds = {(x.dtype, x.device) for x in tensors.values()}
    if len(kinds) > 1:
        got = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(message("model", got, "parameters of one dtype on one device", "call model.to(...) first"))
