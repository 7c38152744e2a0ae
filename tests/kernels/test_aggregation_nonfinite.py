"""Non-finite uploads named by the pass that forms the mean."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from fedperfix_kernels import BlockLayout, aggregate
from fedperfix_kernels.aggregation import composed
from fedperfix_kernels.arena import BLOCK
from tests.conftest import BACKENDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def flags(clients: int, device: torch.device) -> torch.Tensor:
    return torch.ones(clients, dtype=torch.bool, device=device)  # must be overwritten, False included


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("clients", "numel"), [(1, 1), (3, BLOCK), (7, 2 * BLOCK + 1), (33, 3001)])
def test_names_the_clients(clients, numel, value, dtype, backend, device) -> None:
    uploads = torch.randn(clients, numel, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    hit = sorted({0, clients // 2, clients - 1})[-2:]
    for k in hit:
        uploads[k, (k * 977 + numel - 1) % numel] = value
    nonfinite = flags(clients, device)
    aggregate(uploads, [1.0] * clients, nonfinite=nonfinite, backend=backend)
    assert nonfinite.nonzero().flatten().tolist() == hit


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_of_zero_hides_nothing(value: float, dtype: torch.dtype, backend: str, device) -> None:
    layout = BlockLayout.of({"a": torch.Size([BLOCK + 3]), "b": torch.Size([5])})
    uploads = torch.ones(3, layout.numel, device=device).to(dtype)
    uploads[1, layout.offsets[1] + 2] = value
    weights = torch.ones(3, 2)
    weights[1, 1] = 0
    for given in ({"weights": weights, "layout": layout}, {"weights": [1, 0, 1]}):
        nonfinite = flags(3, device)
        aggregate(uploads, nonfinite=nonfinite, backend=backend, **given)
        assert nonfinite.tolist() == [False, True, False]


@pytest.mark.parametrize("aggregate_rows", [torch.ops.fedperfix.aggregate_rows, composed.aggregate_rows])
def test_finite_uploads_whose_sum_overflows_are_not_named(aggregate_rows, device: torch.device) -> None:
    """Shares that sum to 1 hardly overflow, so these sum to 4."""
    uploads = torch.full((4, BLOCK + 5), 3e38, device=device)
    out, nonfinite = torch.empty(BLOCK + 5, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    shares = torch.ones(4, 1, device=device)
    aggregate_rows(uploads, shares, None, None, out, nonfinite)
    assert out.isinf().all()
    assert not nonfinite.any()
    uploads[2, BLOCK] = torch.nan
    aggregate_rows(uploads, shares, None, None, out, nonfinite)
    assert nonfinite.tolist() == [False, False, True, False]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_the_mean_has_the_same_bits_with_and_without(backend: str, device: torch.device) -> None:
    uploads = torch.randn(9, 3001, device=device)
    uploads[4, 7] = torch.inf
    plain = aggregate(uploads, torch.arange(1, 10), backend=backend)
    checked = aggregate(uploads, torch.arange(1, 10), nonfinite=flags(9, device), backend=backend)
    assert np.array_equal(plain.cpu().numpy(), checked.cpu().numpy(), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_state_dicts(backend: str, device: torch.device) -> None:
    uploads = [
        {"w": torch.randn(33, 65, device=device), "h": torch.randn(7, device=device).half()} for _ in range(4)
    ]
    nonfinite = flags(4, device)
    aggregate(uploads, [1, 1, 1, 1], nonfinite=nonfinite, backend=backend)
    assert not nonfinite.any()
    uploads[0]["w"][3, 4] = torch.nan
    uploads[3]["h"][6] = torch.inf
    aggregate(uploads, [0, 1, 1, 1], nonfinite=nonfinite, backend=backend)
    assert nonfinite.tolist() == [True, False, False, True]


GOOD = torch.zeros(2, 5)
ERRORS = [
    (torch.zeros(2), ValueError, "nonfinite: got shape (2,), torch.float32"),
    (
        torch.zeros(3, dtype=torch.bool),
        ValueError,
        "nonfinite: got shape (3,), torch.bool, cpu, takes",
    ),
    (torch.zeros(4, dtype=torch.bool)[::2], ValueError, "nonfinite: got shape (2,)"),
    ([False, False], TypeError, "nonfinite: got a list, takes a torch.Tensor"),
]


@pytest.mark.parametrize(("nonfinite", "error", "text"), ERRORS, ids=[text for *_, text in ERRORS])
def test_wrong_arguments(nonfinite: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        aggregate(GOOD, [1, 1], nonfinite=nonfinite)
