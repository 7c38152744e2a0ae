"""All parameters of a model as views of one flat buffer, shared part first.

    flat = [ shared parameters | local parameters ]

A client's upload is then one contiguous slice, loading a new global model is one copy, and an optimizer can
update the whole model in one call. Every tensor starts on a block boundary, so that a block of the aggregation
kernel belongs to one tensor; the padding between tensors is zero and stays zero.
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

    def block_layer(self, device: torch.device) -> Tensor:
        """The tensor's index of every block: int32 [numel / BLOCK], kept per device."""
        return _block_layer(self, device)


@functools.lru_cache(maxsize=32)
def _block_layer(layout: BlockLayout, device: torch.device) -> Tensor:
    ends = (*layout.offsets[1:], layout.numel)
    blocks = torch.tensor([end - start for start, end in zip(layout.offsets, ends, strict=True)]) // BLOCK
    return torch.repeat_interleave(torch.arange(layout.layers, dtype=torch.int32), blocks).to(device)


class ParameterArena:
    """Keeps a model's parameters in one flat buffer, the shared ones before the local ones.

    Args:
        model: its parameters become views of the buffer; names, shapes, values and `requires_grad` stay.
        local: names (of `model.named_parameters()`) of the parameters that are not shared.

    Attributes:
        flat: [P] the whole buffer; `shared` [P_shared] and `local` [P_local] are its two contiguous parts.
        layout, shared_layout, local_layout: where each tensor lies in them.
        gradients: [P] after `attach_gradients`, else None.

    Raises:
        ValueError: an unknown name, no parameters, or parameters of several dtypes or devices.
    """

    def __init__(self, model: nn.Module, local: Iterable[str] = ()) -> None:
        parameters = dict(model.named_parameters())  # tied parameters appear once
        local_names = set(local)
        _check_parameters(parameters, local_names)
        ordered = [name for name in parameters if name not in local_names]
        ordered += [name for name in parameters if name in local_names]
        shapes = {name: parameters[name].shape for name in ordered}
        shared = {name: shape for name, shape in shapes.items() if name not in local_names}

        self.layout = BlockLayout.of(shapes)
        self.shared_layout = BlockLayout.of(shared)
        self.local_layout = BlockLayout.of({n: s for n, s in shapes.items() if n in local_names})
        first = next(iter(parameters.values()))
        self.flat = torch.zeros(self.layout.numel, dtype=first.dtype, device=first.device)
        self.shared = self.flat[: self.shared_layout.numel]
        self.local = self.flat[self.shared_layout.numel :]
        self.gradients: Tensor | None = None
        self._parameters = {name: parameters[name] for name in ordered}
        for name, view in self.layout.views(self.flat).items():
            view.copy_(parameters[name].detach())
            parameters[name].data = view

    def attach_gradients(self) -> Tensor:
        """Give every trainable parameter a `.grad` that is a view of one flat buffer, and return that buffer [P].

        Autograd then adds into the buffer; set it to zero with `zero_gradients`, never with `set_to_none`.
        """
        if self.gradients is None:
            self.gradients = torch.zeros_like(self.flat)
        for name, view in self.layout.views(self.gradients).items():
            parameter = self._parameters[name]
            parameter.grad = view if parameter.requires_grad else None
        return self.gradients

    def zero_gradients(self) -> None:
        """Set the flat gradient buffer to zero in one call."""
        if self.gradients is not None:
            self.gradients.zero_()

    def check(self) -> None:
        """Raise RuntimeError if a parameter is no longer a view of the buffer (after `model.to(...)`, for one)."""
        for name, view in self.layout.views(self.flat).items():
            parameter = self._parameters[name]
            if parameter.data_ptr() != view.data_ptr() or parameter.device != view.device:
                raise RuntimeError(
                    f"ParameterArena: parameter '{name}' no longer lies in the flat buffer; move or cast the "
                    "model before building the arena, and assign values in place"
                )


def _check_parameters(parameters: dict[str, nn.Parameter], local: set[str]) -> None:
    if not parameters:
        raise ValueError(message("model", "a module without parameters", "a module with at least one"))
    unknown = sorted(local - parameters.keys())
    if unknown:
        raise ValueError(message("local", ", ".join(unknown), "names of the model's parameters"))
    kinds = {(x.dtype, x.device) for x in parameters.values()}
    if len(kinds) > 1:
        got = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(message("model", got, "parameters of one dtype on one device", "call model.to(...) first"))
