"""The Triton implementation as PyTorch operators. They have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("fedperfix", "FRAGMENT")


def _launch():
    from fedperfix_kernels.aggregation import triton_launch  # only here: triton may not be installed

    return triton_launch


def _aggregate_rows(
    uploads: Tensor,
    shares: Tensor,
    block_layer: Tensor | None,
    scales: Tensor | None,
    out: Tensor,
    nonfinite: Tensor | None,
) -> None:
    _launch().aggregate_rows(uploads, shares, block_layer, scales, out, nonfinite)


def _aggregate_tensors(uploads: list[Tensor], shares: Tensor, out: list[Tensor], nonfinite: Tensor | None) -> None:
    count = len(out)
    clients = [uploads[first : first + count] for first in range(0, len(uploads), count)]
    _launch().aggregate_tensors(clients, shares, out, nonfinite)


def _trimmed_mean(uploads: Tensor, trim: int, out: Tensor) -> None:
    _launch().trimmed_mean(uploads, trim, out)


def _shifted_mean(uploads: Tensor, center: Tensor, shares: Tensor, std: float, seed: int, out: Tensor) -> None:
    _launch().shifted_mean(uploads, center, shares, std, seed, out)


def _quantize(x: Tensor, values: Tensor, scales: Tensor) -> None:
    _launch().quantize(x, values, scales)


def _squared_norms(uploads: Tensor, center: Tensor) -> Tensor:
    return _launch().squared_norms(uploads, center)


def _gram(uploads: Tensor, center: Tensor) -> Tensor:
    return _launch().gram(uploads, center)


def _writes(*_: object) -> None:
    return None


def _fake_squared_norms(uploads: Tensor, center: Tensor) -> Tensor:
    return uploads.new_empty(uploads.shape[0], dtype=torch.float64)


def _fake_gram(uploads: Tensor, center: Tensor) -> Tensor:
    return uploads.new_empty(uploads.shape[0], uploads.shape[0], dtype=torch.float64)


_OPERATORS = (
    (
        "aggregate_rows(Tensor uploads, Tensor shares, Tensor? block_layer, Tensor? scales, Tensor(a!) out, "
        "Tensor(b!)? nonfinite) -> ()",
        _aggregate_rows,
        _writes,
    ),
    (
        "aggregate_tensors(Tensor[] uploads, Tensor shares, Tensor(a!)[] out, Tensor(b!)? nonfinite) -> ()",
        _aggregate_tensors,
        _writes,
    ),
    ("trimmed_mean(Tensor uploads, int trim, Tensor(a!) out) -> ()", _trimmed_mean, _writes),
    (
        "shifted_mean(Tensor uploads, Tensor center, Tensor shares, float std, int seed, Tensor(a!) out) -> ()",
        _shifted_mean,
        _writes,
    ),
    ("quantize(Tensor x, Tensor(a!) values, Tensor(b!) scales) -> ()", _quantize, _writes),
    ("squared_norms(Tensor uploads, Tensor center) -> Tensor", _squared_norms, _fake_squared_norms),
    ("gram(Tensor uploads, Tensor center) -> Tensor", _gram, _fake_gram),
)

for _schema, _implementation, _fake in _OPERATORS:
    _library.define(_schema)
    _name = _schema.partition("(")[0]
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fedperfix::{_name}", _fake)
