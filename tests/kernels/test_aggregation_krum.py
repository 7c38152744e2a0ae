"""Krum and Multi-Krum against a double loop over clients in NumPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from bench.timing import peak_memory
from fedperfix_kernels import krum
from fedperfix_kernels.arena import BLOCK
from tests.conftest import BACKENDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs_of(clients: int, numel: int, dtype: torch.dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(clients + numel)
    center = 3 * torch.randn(numel, generator=generator)
    uploads = center + 0.1 * torch.rand(clients, 1) * torch.randn(clients, numel, generator=generator)
    return uploads.to(dtype).to(device), center.to(dtype).to(device)


def scores_of(uploads: torch.Tensor, byzantine: int) -> np.ndarray:
    """Blanchard et al.: the sum of the K − f − 2 smallest squared distances to the others."""
    rows = uploads.double().cpu().numpy()
    scores = []
    for i in range(len(rows)):
        distances = sorted(((rows[i] - rows[j]) ** 2).sum() for j in range(len(rows)) if j != i)
        scores.append(sum(distances[: len(rows) - byzantine - 2]))
    return np.array(scores)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("clients", "numel", "byzantine", "select"),
    [(3, 1, 0, 1), (3, 7, 0, 3), (7, BLOCK + 1, 2, 1), (7, BLOCK - 1, 1, 4), (33, 3001, 10, 5), (65, 17, 31, 34)],
)
@pytest.mark.usefixtures("poisoned")
def test_against_a_double_loop(clients, numel, byzantine, select, dtype, backend, device) -> None:
    uploads, center = inputs_of(clients, numel, dtype, device)
    mean, chosen = krum(uploads, center, byzantine, select, backend=backend)
    assert (mean.dtype, mean.shape, chosen.dtype, chosen.shape) == (dtype, (numel,), torch.int64, (select,))
    scores, indices = scores_of(uploads, byzantine), chosen.tolist()
    assert len(set(indices)) == select
    # In order of their scores, none left out better than a chosen one, as far as float32 tells them apart.
    allowed = 1e-5 * scores.max() + 1e-12
    assert (np.diff(scores[indices]) >= -allowed).all()
    assert scores[indices].max() <= np.delete(scores, indices).min(initial=np.inf) + allowed
    expected = uploads.double().cpu().numpy()[indices].mean(0)
    largest = uploads.double().abs().max().item()
    bound = largest * (torch.finfo(dtype).eps + select * 2**-23)
    assert np.abs(mean.double().cpu().numpy() - expected).max() <= bound


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_by_hand(backend: str, device: torch.device) -> None:
    """Five numbers, one of them hostile: each score is the sum of the two smallest squared distances."""
    uploads = torch.tensor([[0.0], [1.0], [1.5], [3.0], [100.0]], device=device)
    mean, chosen = krum(uploads, torch.zeros(1, device=device), 1, 2, backend=backend)
    assert chosen.tolist() == [1, 2]  # 1.25 and 2.5; then 0 with 3.25
    assert mean.tolist() == [1.25]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("value", [1e4, torch.nan, torch.inf])
def test_hostile_uploads_are_not_chosen(value: float, backend: str, device: torch.device) -> None:
    uploads, center = inputs_of(9, 300, torch.float32, device)
    uploads[0] += value
    uploads[5, 7] = value
    mean, chosen = krum(uploads, center, 3, 6, backend=backend)
    assert not {0, 5} & set(chosen.tolist())
    assert mean.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_too_many_nonfinite_uploads_are_an_error(backend: str, device: torch.device) -> None:
    uploads, center = inputs_of(7, 20, torch.float32, device)
    uploads[:5] = torch.nan
    with pytest.raises(ValueError, match="got only 0 clients near enough to others, takes at least select=1"):
        krum(uploads, center, 2, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_equal_scores_choose_the_first_clients_and_the_same_bits(backend: str, device: torch.device) -> None:
    uploads = torch.randn(1, 200, device=device).repeat(6, 1)
    results = [krum(uploads, torch.zeros(200, device=device), 1, 2, backend=backend) for _ in range(2)]
    assert [chosen.tolist() for _, chosen in results] == [[0, 1], [0, 1]]
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_rows_of_a_wider_buffer_into_a_given_output(backend: str, device: torch.device) -> None:
    uploads, center = inputs_of(5, 150, torch.float32, device)
    out = torch.full((100,), torch.nan, device=device)
    mean, chosen = krum(uploads[:, 7:107], center[7:107], 1, out=out, backend=backend)
    assert mean is out
    assert torch.equal(out, uploads[chosen[0], 7:107])


@pytest.mark.parametrize("backend", BACKENDS[:-1], indirect=True)
def test_no_temporary_of_the_uploads_size(backend: str, device: torch.device) -> None:
    uploads = torch.randn(16, 300 * BLOCK if backend == "torch" else 16 * BLOCK, device=device).bfloat16()
    center = torch.zeros_like(uploads[0])
    peak = peak_memory(lambda _: krum(uploads, center, 2, 3, backend=backend), device)
    assert 0 < peak < uploads.nbytes


def test_opcheck(device: torch.device) -> None:
    arguments = torch.randn(3, 20, device=device), torch.zeros(20, device=device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fedperfix.gram, arguments, test_utils=tests)


GOOD = {"uploads": torch.zeros(7, 5), "center": torch.zeros(5), "byzantine": 2}
ERRORS = [
    ({"uploads": torch.zeros(2, 5)}, ValueError, "uploads: got 2 clients, takes at least 3 for Krum"),
    ({"uploads": torch.zeros(7, 5).long()}, TypeError, "uploads: got torch.int64"),
    ({"byzantine": 3}, ValueError, "byzantine: got 3, takes an integer from 0 to 2; there are 7 uploads"),
    ({"byzantine": "2"}, TypeError, "byzantine: got a str, takes an int"),
    ({"select": 0}, ValueError, "select: got 0, takes an integer from 1 to 5; 2 of 7 uploads may be hostile"),
    ({"select": 6}, ValueError, "select: got 6"),
    ({"center": torch.zeros(4)}, ValueError, "center: got shape (4,)"),
    ({"out": torch.zeros(4)}, ValueError, "out: got shape (4,)"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS, ids=[text for *_, text in ERRORS])
def test_wrong_arguments(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        krum(**(GOOD | arguments))


def test_limits_of_the_triton_backend(device: torch.device) -> None:
    with pytest.raises(ValueError, match="uploads: got 129 clients, takes at most 128 with the triton backend"):
        krum(torch.zeros(129, 2, device=device), torch.zeros(2, device=device), 1, backend="triton")
