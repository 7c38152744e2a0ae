"""The Triton implementation as PyTorch operators that write into `out`. They have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("fedperfix", "FRAGMENT")
_library.define("aggregate_rows(Tensor uploads, Tensor shares, Tensor? block_layer, Tensor(a!) out) -> ()")
_library.define("aggregate_tensors(Tensor[] uploads, Tensor shares, Tensor(a!)[] out) -> ()")


def _aggregate_rows(uploads: Tensor, shares: Tensor, block_layer: Tensor | None, out: Tensor) -> None:
    from fedperfix_kernels.aggregation import triton_launch  # only here: triton may not be installed

    triton_launch.aggregate_rows(uploads, shares, block_layer, out)


def _aggregate_tensors(uploads: list[Tensor], shares: Tensor, out: list[Tensor]) -> None:
    from fedperfix_kernels.aggregation import triton_launch

    count = len(out)
    clients = [uploads[first : first + count] for first in range(0, len(uploads), count)]
    triton_launch.aggregate_tensors(clients, shares, out)


_library.impl("aggregate_rows", _aggregate_rows, "CompositeExplicitAutograd")
_library.impl("aggregate_tensors", _aggregate_tensors, "CompositeExplicitAutograd")


@torch.library.register_fake("fedperfix::aggregate_rows")
def _fake_rows(uploads: Tensor, shares: Tensor, block_layer: Tensor | None, out: Tensor) -> None:
    return None


@torch.library.register_fake("fedperfix::aggregate_tensors")
def _fake_tensors(uploads: list[Tensor], shares: Tensor, out: list[Tensor]) -> None:
    return None
