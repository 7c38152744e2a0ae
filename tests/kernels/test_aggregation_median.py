"""Coordinate-wise median and trimmed mean against NumPy in float64."""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch

from bench.timing import peak_memory
from fedperfix_kernels import median, trimmed_mean
from fedperfix_kernels.aggregation import configs, triton_launch
from fedperfix_kernels.aggregation.network import comparators, leading_to
from fedperfix_kernels.arena import BLOCK
from tests.conftest import BACKENDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [(1, 1), (2, 7), (3, BLOCK - 1), (7, BLOCK + 1), (8, 3001), (33, 9), (65, 3), (128, 5)]


@pytest.fixture(autouse=True)
def narrow_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter sorts element by element: without a GPU, few elements per program."""
    if device.type != "cuda":
        narrow = tuple(dataclasses.replace(tile, block=4) for tile in configs.SORTS)
        monkeypatch.setattr(triton_launch, "SORTS", narrow)


def uploads_of(clients: int, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(clients)
    return torch.randn(clients, numel, generator=generator).to(dtype).to(device)


def numpy_rows(uploads: torch.Tensor) -> np.ndarray:
    return uploads.double().cpu().numpy()


def bound(uploads: torch.Tensor) -> float:
    largest = uploads.double().abs().max().item()
    return largest * (torch.finfo(uploads.dtype).eps + uploads.shape[0] * 2**-23)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("clients", "numel"), SIZES)
@pytest.mark.usefixtures("poisoned")
def test_median(clients: int, numel: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    uploads = uploads_of(clients, numel, dtype, device)
    result = median(uploads, backend=backend)
    assert (result.dtype, result.shape) == (dtype, (numel,))
    error = np.abs(numpy_rows(result) - np.median(numpy_rows(uploads), axis=0)).max()
    assert error <= (0 if clients % 2 else bound(uploads))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("clients", "trim"), [(1, 0), (5, 1), (8, 0), (9, 2), (20, 9), (40, 3)])
@pytest.mark.usefixtures("poisoned")
def test_trimmed_mean(clients: int, trim: int, backend: str, device: torch.device) -> None:
    uploads = uploads_of(clients, 13, torch.float32, device)
    expected = np.sort(numpy_rows(uploads), axis=0)[trim : clients - trim].mean(0)
    result = numpy_rows(trimmed_mean(uploads, trim, backend=backend))
    assert np.abs(result - expected).max() <= bound(uploads)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_by_hand(backend: str, device: torch.device) -> None:
    uploads = torch.tensor([[1.0, 9.0], [2.0, -9.0], [3.0, 5.0], [1000.0, 6.0]], device=device)
    assert median(uploads, backend=backend).tolist() == [2.5, 5.5]
    assert trimmed_mean(uploads, 1, backend=backend).tolist() == [2.5, 5.5]
    assert median(uploads[:3], backend=backend).tolist() == [2.0, 5.0]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("clients", [5, 6, 40])
def test_infinite_values_are_extreme_and_nan_is_nan(clients: int, backend: str, device: torch.device) -> None:
    uploads = uploads_of(clients, 6, torch.float32, device)
    uploads[0, 1], uploads[1, 2], uploads[2, 3] = torch.inf, -torch.inf, torch.nan
    uploads[:, 4] = torch.inf
    expected = np.median(numpy_rows(uploads), axis=0)  # also NaN where a value is
    result = numpy_rows(median(uploads, backend=backend))
    assert np.isnan(result).tolist() == [i == 3 for i in range(6)]
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("client", range(7))
def test_no_client_can_hide_a_nan(client: int, backend: str, device: torch.device) -> None:
    uploads = uploads_of(7, 3, torch.float32, device)
    uploads[client, 1] = torch.nan
    assert median(uploads, backend=backend).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("columns", [slice(0, 100), slice(1, 101)])
def test_rows_of_a_wider_buffer_into_a_given_output(columns: slice, backend: str, device) -> None:
    uploads = torch.randn(5, 150, device=device)[:, columns]
    out = torch.full((100,), torch.nan, device=device)
    assert median(uploads, out=out, backend=backend) is out
    assert np.array_equal(numpy_rows(out), np.median(numpy_rows(uploads), axis=0))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_the_same_input_gives_the_same_bits(backend: str, device: torch.device) -> None:
    uploads = uploads_of(10, 500, torch.float32, device)
    first = trimmed_mean(uploads, 2, backend=backend)
    assert torch.equal(first, trimmed_mean(uploads, 2, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS[:-1], indirect=True)
def test_no_temporary_of_the_uploads_size(backend: str, device: torch.device) -> None:
    uploads = torch.randn(16, 300 * BLOCK if backend == "torch" else 3 * BLOCK, device=device).to(torch.bfloat16)
    out = torch.empty(uploads.shape[1], dtype=torch.bfloat16, device=device)
    peak = peak_memory(lambda _: median(uploads, out=out, backend=backend), device)
    assert peak < uploads.nbytes


@pytest.mark.parametrize("count", range(1, 10))
def test_the_network_sorts_every_sequence_of_zeros_and_ones(count: int) -> None:
    """Which is enough for every sequence (Knuth, volume 3, 5.3.4)."""
    rows = np.array(list(itertools.product([0, 1], repeat=count))).T
    pruned = rows.copy()
    for i, j in comparators(count):
        rows[[i, j]] = np.minimum(rows[i], rows[j]), np.maximum(rows[i], rows[j])
    assert np.array_equal(rows, np.sort(rows, axis=0))
    middle = (count - 1) // 2
    pairs = leading_to(comparators(count), [middle])
    for i, j in pairs:
        pruned[[i, j]] = np.minimum(pruned[i], pruned[j]), np.maximum(pruned[i], pruned[j])
    assert np.array_equal(pruned[middle], rows[middle])
    assert len(pairs) < len(comparators(count)) or count < 5


@pytest.mark.parametrize("clients", [3, 40])
def test_opcheck(clients: int, device: torch.device) -> None:
    uploads, out = torch.randn(clients, 20, device=device), torch.empty(20, device=device)
    arguments, tests = (uploads, 1, out), ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fedperfix.trimmed_mean, arguments, test_utils=tests)


GOOD = torch.zeros(4, 5)
ERRORS = [
    ({"uploads": torch.zeros(5)}, ValueError, "uploads: got shape (5,)"),
    ({"uploads": [1]}, TypeError, "uploads: got a list, takes a torch.Tensor"),
    ({"uploads": GOOD.long()}, TypeError, "uploads: got torch.int64, takes a floating dtype"),
    ({"uploads": torch.zeros(5, 4).T}, ValueError, "takes an innermost stride of 1"),
    ({"trim": 2}, ValueError, "trim: got 2, takes an integer from 0 to 1; there are 4 uploads"),
    ({"trim": -1}, ValueError, "trim: got -1"),
    ({"trim": 0.1}, TypeError, "trim: got a float, takes an int"),
    ({"trim": True}, TypeError, "trim: got a bool, takes an int"),
    ({"out": torch.zeros(4)}, ValueError, "out: got shape (4,)"),
    ({"out": torch.zeros(5).half()}, ValueError, "out: got shape (5,), torch.float16"),
    ({"out": GOOD[0]}, ValueError, "out: got a view of the uploads' memory"),
    ({"backend": "numpy"}, ValueError, "backend: got 'numpy'"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS, ids=[text for *_, text in ERRORS])
def test_wrong_arguments(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        trimmed_mean(**({"uploads": GOOD, "trim": 1} | arguments))


def test_limits_of_the_triton_backend(device: torch.device) -> None:
    with pytest.raises(ValueError, match="uploads: got 129 clients, takes at most 128 with the triton backend"):
        median(torch.zeros(129, 2, device=device), backend="triton")
    with pytest.raises(TypeError, match="uploads: got float64"):
        median(torch.zeros(2, 2, device=device, dtype=torch.float64), backend="triton")
    wide = torch.arange(129.0, device=device)[:, None]
    assert median(wide, backend="torch").item() == 64.0
