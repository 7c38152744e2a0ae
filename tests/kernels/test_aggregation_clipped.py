"""Norm-clipped and noisy means against NumPy in float64."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from bench.timing import peak_memory
from fedperfix_kernels import clipped_mean, noisy_mean
from fedperfix_kernels.arena import BLOCK
from tests.conftest import BACKENDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [(1, 1), (2, 7), (3, BLOCK - 1), (7, BLOCK + 1), (33, 3001), (65, 17)]


def inputs_of(clients: int, numel: int, dtype: torch.dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Uploads [K, P] around a model [P], the updates of later clients longer."""
    generator = torch.Generator().manual_seed(clients)
    center = torch.randn(numel, generator=generator)
    lengths = torch.linspace(0.1, 1, clients)[:, None]
    uploads = center + lengths * torch.randn(clients, numel, generator=generator)
    return uploads.to(dtype).to(device), center.to(dtype).to(device)


def expected_mean(uploads: torch.Tensor, weights: np.ndarray, center: torch.Tensor, max_norm: float) -> np.ndarray:
    model = center.double().cpu().numpy()
    total = np.zeros_like(model)
    for row, weight in zip(uploads.double().cpu().numpy(), weights, strict=True):
        norm = np.linalg.norm(row - model)
        total += weight / weights.sum() * (row - model) * (1 if norm <= max_norm else max_norm / norm)
    return model + total


def bound(uploads: torch.Tensor) -> float:
    """Rounding of the result to its storage type, of K float32 products, and of the norms."""
    largest = uploads.double().abs().max().item()
    return largest * (torch.finfo(uploads.dtype).eps + (uploads.shape[0] + 8) * 2**-23)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("clients", "numel"), SIZES)
@pytest.mark.usefixtures("poisoned")
def test_clipped_mean(clients: int, numel: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    uploads, center = inputs_of(clients, numel, dtype, device)
    weights = np.arange(1.0, clients + 1)
    max_norm = 0.5 * numel**0.5  # the longer updates are clipped, the shorter ones are not
    result = clipped_mean(uploads, weights, center, max_norm, backend=backend)
    assert (result.dtype, result.shape) == (dtype, (numel,))
    error = np.abs(result.double().cpu().numpy() - expected_mean(uploads, weights, center, max_norm)).max()
    assert error <= bound(uploads)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_by_hand(backend: str, device: torch.device) -> None:
    """Updates of norm 5, 0.5 and 0 around (1, 1), clipped to norm 1."""
    uploads = torch.tensor([[4.0, 5.0], [1.5, 1.0], [1.0, 1.0]], device=device)
    center = torch.ones(2, device=device)
    mean = clipped_mean(uploads, [1, 1, 2], center, 1.0, backend=backend)
    torch.testing.assert_close(mean.cpu(), torch.tensor([1 + (0.6 + 0.5) / 4, 1 + 0.8 / 4]))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_one_client_moves_the_mean_by_its_share_of_max_norm_at_most(backend: str, device: torch.device) -> None:
    uploads, center = inputs_of(5, 3001, torch.float32, device)
    uploads[4] *= 1e6
    honest = uploads.clone()
    honest[4] = center
    moved = [clipped_mean(x, [1] * 5, center, 2.0, backend=backend) for x in (uploads, honest)]
    torch.testing.assert_close((moved[0] - moved[1]).norm().item(), 2.0 / 5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_nan_reaches_the_result(backend: str, device: torch.device) -> None:
    uploads, center = inputs_of(3, 10, torch.float32, device)
    uploads[1, 4] = torch.nan
    assert clipped_mean(uploads, [1, 1, 1], center, 1.0, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_without_noise_the_noisy_mean_is_the_unweighted_clipped_mean(dtype, backend, device) -> None:
    uploads, center = inputs_of(7, 1025, dtype, device)
    clipped = clipped_mean(uploads, [1] * 7, center, 3.0, backend=backend)
    assert torch.equal(noisy_mean(uploads, center, 3.0, 0.0, 1, backend=backend), clipped)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("seed", [0, 2**40])
def test_noise_is_normal_with_the_stated_deviation(seed: int, backend: str, device: torch.device) -> None:
    clients, numel = 4, 20_000
    center = torch.zeros(numel, device=device)
    uploads = torch.zeros(clients, numel, device=device)
    noise = noisy_mean(uploads, center, 2.0, 3.0, seed, backend=backend).double().cpu() / (3.0 * 2.0 / clients)
    # Five standard errors of the mean, the variance, the skewness, the fourth moment and neighbours' correlation.
    allowed = 5 * numel**-0.5
    assert abs(noise.mean()) < allowed
    assert abs(noise.var() - 1) < allowed * 2**0.5
    assert abs((noise**3).mean()) < allowed * 15**0.5
    assert abs((noise**4).mean() - 3) < allowed * 96**0.5
    assert abs((noise[1:] * noise[:-1]).mean()) < allowed
    assert 3.3 < noise.abs().max() < 6


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_equal_seeds_give_equal_bits_and_others_do_not(backend: str, device: torch.device) -> None:
    uploads, center = inputs_of(3, 3001, torch.float32, device)
    first, again, other = (noisy_mean(uploads, center, 1.0, 1.0, seed, backend=backend) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    noise = first - clipped_mean(uploads, [1] * 3, center, 1.0, backend=backend)
    others = other - clipped_mean(uploads, [1] * 3, center, 1.0, backend=backend)
    assert abs(torch.corrcoef(torch.stack([noise, others]))[0, 1]) < 0.1


@pytest.mark.parametrize("backend", BACKENDS[:-1], indirect=True)
def test_no_temporary_of_the_uploads_size(backend: str, device: torch.device) -> None:
    uploads = torch.randn(16, 300 * BLOCK if backend == "torch" else 16 * BLOCK, device=device).bfloat16()
    center = torch.zeros_like(uploads[0])
    peak = peak_memory(lambda _: noisy_mean(uploads, center, 1.0, 1.0, 0, backend=backend), device)
    assert 0 < peak < uploads.nbytes


def test_opcheck(device: torch.device) -> None:
    uploads, center, out = torch.randn(3, 20, device=device), torch.zeros(20, device=device), torch.empty(20)
    tests, shares = ("test_schema", "test_faketensor"), torch.full((3,), 0.2, device=device)
    torch.library.opcheck(torch.ops.fedperfix.squared_norms, (uploads, center), test_utils=tests)
    arguments = (uploads, center, shares, 0.5, 7, out.to(device))
    torch.library.opcheck(torch.ops.fedperfix.shifted_mean, arguments, test_utils=tests)


GOOD = {"uploads": torch.zeros(2, 5), "center": torch.zeros(5), "max_norm": 1.0}
ERRORS = [
    ({"uploads": torch.zeros(5)}, ValueError, "uploads: got shape (5,)"),
    (
        {"center": torch.zeros(4)},
        ValueError,
        "center: got shape (4,), torch.float32, cpu, takes a contiguous",
    ),
    ({"center": torch.zeros(5).half()}, ValueError, "center: got shape (5,), torch.float16"),
    ({"center": torch.zeros(10)[::2]}, ValueError, "center: got shape (5,)"),
    ({"max_norm": 0}, ValueError, "max_norm: got 0, takes a finite number above 0"),
    ({"max_norm": float("nan")}, ValueError, "max_norm: got nan"),
    ({"max_norm": torch.ones(())}, TypeError, "max_norm: got a Tensor, takes a number"),
    ({"out": torch.zeros(4)}, ValueError, "out: got shape (4,)"),
    ({"out": GOOD["center"]}, ValueError, "out: got memory of center"),
]
CLIPPED_ERRORS = [
    ({"weights": [1]}, ValueError, "weights: got shape (1,)"),
    ({"weights": [[1], [1]]}, ValueError, "weights: got shape (2, 1), takes shape [2]"),
    ({"weights": [0, 0]}, ValueError, "weights: got weights that sum to 0"),
]
NOISY_ERRORS = [
    ({"noise_multiplier": -1}, ValueError, "noise_multiplier: got -1, takes a finite number of at least 0"),
    ({"seed": -1}, ValueError, "seed: got -1, takes an integer from 0 to 9223372036854775807"),
    ({"seed": 1.5}, TypeError, "seed: got a float, takes an int"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS + CLIPPED_ERRORS, ids=lambda x: str(x)[:40])
def test_wrong_arguments_of_the_clipped_mean(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        clipped_mean(**({"weights": [1, 1]} | GOOD | arguments))


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS + NOISY_ERRORS, ids=lambda x: str(x)[:40])
def test_wrong_arguments_of_the_noisy_mean(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        noisy_mean(**({"noise_multiplier": 1.0, "seed": 0} | GOOD | arguments))
