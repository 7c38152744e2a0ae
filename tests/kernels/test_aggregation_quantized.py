"""Int8 uploads: the error of quantisation, and the mean that dequantises while it sums."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from bench.timing import peak_memory
from fedperfix_kernels import BlockLayout, Quantized, aggregate, quantize
from fedperfix_kernels.arena import BLOCK
from tests.conftest import BACKENDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rows_of(clients: int, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows whose blocks differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(clients + numel)
    sizes = 10.0 ** (torch.arange(numel) // BLOCK - 2)
    return (torch.randn(clients, numel, generator=generator) * sizes).to(dtype).to(device)


def element_scales(scales: torch.Tensor, numel: int) -> np.ndarray:
    return np.repeat(scales.double().cpu().numpy(), BLOCK, axis=-1)[..., :numel]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3001])
@pytest.mark.usefixtures("poisoned")
def test_quantize(numel: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x = rows_of(1, numel, dtype, device)[0]
    quantized = quantize(x, backend=backend)
    assert (quantized.values.dtype, quantized.values.shape) == (torch.int8, (numel,))
    assert (quantized.scales.dtype, quantized.scales.shape) == (torch.float32, (-(-numel // BLOCK),))
    exact = x.double().cpu().numpy()
    largest = [np.abs(exact[first : first + BLOCK]).max() for first in range(0, numel, BLOCK)]
    np.testing.assert_allclose(quantized.scales.double().cpu().numpy(), np.array(largest) / 127, rtol=1e-6)
    scales = element_scales(quantized.scales, numel)
    error = np.abs(quantized.values.double().cpu().numpy() * scales - exact)
    assert (error <= scales * (0.5 + 1e-4)).all()
    assert quantized.values.min() >= -127


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_blocks_of_zeros_and_of_the_smallest_numbers(backend: str, device: torch.device) -> None:
    x = torch.zeros(2 * BLOCK, device=device)
    x[BLOCK] = 1e-40
    quantized = quantize(x, backend=backend)
    assert quantized.values.count_nonzero() == 0
    assert (quantized.scales > 0).all()
    assert (quantized.scales < 1e-37).all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_block_is_refused(value: float, backend: str, device: torch.device) -> None:
    x = torch.ones(2 * BLOCK + 5, device=device)
    x[2 * BLOCK + 3] = value
    with pytest.raises(ValueError, match="x: got NaN or Inf in elements 2048 to 2052, takes finite elements"):
        quantize(x, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("clients", "numel"), [(1, 1), (2, 7), (7, BLOCK + 1), (33, 3001)])
@pytest.mark.usefixtures("poisoned")
def test_mean_of_quantized_uploads(clients, numel, dtype, backend, device) -> None:
    rows = rows_of(clients, numel, torch.float32, device)
    uploads = Quantized.stack([quantize(row, backend="torch") for row in rows])
    shares = np.arange(1.0, clients + 1) / np.arange(1.0, clients + 1).sum()
    out = torch.full((numel,), torch.nan, dtype=dtype, device=device)
    assert aggregate(uploads, np.arange(1.0, clients + 1), out=out, backend=backend) is out
    result, scales = out.double().cpu().numpy(), element_scales(uploads.scales, numel)
    values = uploads.values.double().cpu().numpy() * scales
    rounding = np.abs(values).max(0) * (torch.finfo(dtype).eps + (clients + 2) * 2**-23) + 1e-7 * (
        dtype.itemsize == 2
    )
    assert (np.abs(result - (shares[:, None] * values).sum(0)) <= rounding).all()
    exact = (shares[:, None] * rows.double().cpu().numpy()).sum(0)
    assert (np.abs(result - exact) <= (shares[:, None] * scales).sum(0) * (0.5 + 1e-4) + rounding).all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.usefixtures("poisoned")
def test_weights_per_layer(backend: str, device: torch.device) -> None:
    layout = BlockLayout.of({"a": torch.Size([BLOCK + 3]), "b": torch.Size([5]), "c": torch.Size([2, 3])})
    rows = rows_of(5, layout.numel, torch.float32, device)
    uploads = Quantized.stack([quantize(row) for row in rows])
    weights = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    mean = aggregate(uploads, weights, layout=layout, backend=backend)
    assert mean.dtype == torch.float32
    values = uploads.values.double().cpu().numpy() * element_scales(uploads.scales, layout.numel)
    column = np.repeat(layout.block_layer(torch.device("cpu")).numpy(), BLOCK)
    shares = (weights.double() / weights.double().sum(0)).numpy()[:, column]
    expected = (shares * values).sum(0)
    assert np.abs(mean.double().cpu().numpy() - expected).max() <= np.abs(values).max() * 7 * 2**-23


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_rows_of_a_preallocated_buffer(backend: str, device: torch.device) -> None:
    buffer = torch.randint(-127, 128, (3, 2500), dtype=torch.int8, device=device)
    uploads = Quantized(buffer[:, :2000], torch.rand(3, 2, device=device))
    mean = aggregate(uploads, [1, 1, 2], backend=backend)
    values = uploads.values.double().cpu().numpy() * element_scales(uploads.scales, 2000)
    np.testing.assert_allclose(mean.double().cpu().numpy(), np.average(values, 0, [1, 1, 2]), atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_nonfinite_scale_names_its_client(backend: str, device: torch.device) -> None:
    """An upload that did not come from `quantize`."""
    values = torch.ones(3, BLOCK + 5, dtype=torch.int8, device=device)
    scales = torch.ones(3, 2, device=device)
    scales[1, 1] = torch.inf
    nonfinite = torch.ones(3, dtype=torch.bool, device=device)
    aggregate(Quantized(values, scales), [1, 0, 1], nonfinite=nonfinite, backend=backend)
    assert nonfinite.tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_the_same_input_gives_the_same_bits(backend: str, device: torch.device) -> None:
    uploads = Quantized.stack([quantize(row) for row in rows_of(5, 3001, torch.float32, device)])
    means = [aggregate(uploads, [1, 2, 3, 4, 5], backend=backend) for _ in range(2)]
    assert torch.equal(*means)


@pytest.mark.parametrize("backend", BACKENDS[:-1], indirect=True)
def test_no_temporary_of_the_uploads_size(backend: str, device: torch.device) -> None:
    numel = (600 if backend == "torch" else 40) * BLOCK
    values = torch.ones(16, numel, dtype=torch.int8, device=device)
    uploads, out = (
        Quantized(values, torch.ones(16, numel // BLOCK, device=device)),
        torch.empty(numel, device=device),
    )
    peak = peak_memory(lambda _: aggregate(uploads, [1.0] * 16, out=out, backend=backend), device)
    assert 0 < peak < values.nbytes


def test_opcheck(device: torch.device) -> None:
    ops, tests = torch.ops.fedperfix, ("test_schema", "test_faketensor")
    x = torch.randn(BLOCK + 3, device=device)
    values, scales = torch.empty(BLOCK + 3, dtype=torch.int8, device=device), torch.empty(2, device=device)
    torch.library.opcheck(ops.quantize, (x, values, scales), test_utils=tests)
    shares, out = torch.ones(1, 1, device=device), torch.empty(BLOCK + 3, device=device)
    arguments = (values[None], shares, None, scales[None], out, None)
    torch.library.opcheck(ops.aggregate_rows, arguments, test_utils=tests)


INT8, SCALES = torch.zeros(2, 5, dtype=torch.int8), torch.ones(6)
ERRORS = [
    (Quantized(INT8[0], torch.ones(1)), {}, ValueError, "uploads.values: got shape (5,)"),
    (Quantized(INT8.float(), torch.ones(2, 1)), {}, TypeError, "uploads.values: got torch.float32"),
    (Quantized(INT8, torch.ones(2, 2)), {}, ValueError, "uploads.scales: got shape (2, 2)"),
    (Quantized(INT8, torch.ones(2, 1).double()), {}, ValueError, "uploads.scales: got shape (2, 1), torch.float64"),
    (Quantized(INT8, [1, 1]), {}, TypeError, "uploads.scales: got a list"),
    (Quantized(INT8, torch.ones(2, 1)), {"out": torch.zeros(5).double()}, ValueError, "out: got shape (5,)"),
    (Quantized(INT8, SCALES[:2, None]), {"out": SCALES[1:6]}, ValueError, "out: got a view of the uploads' scales"),
    (Quantized(INT8, torch.ones(2, 1)), {"weights": [1]}, ValueError, "weights: got shape (1,)"),
]  # fmt: skip


@pytest.mark.parametrize(("uploads", "arguments", "error", "text"), ERRORS, ids=[text for *_, text in ERRORS])
def test_wrong_uploads(uploads: Quantized, arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        aggregate(uploads, **({"weights": [1, 1]} | arguments))


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(2, 3), ValueError, "x: got shape (2, 3)"),
        (torch.zeros(6)[::2], ValueError, "strides (2,), takes a contiguous tensor [P]"),
        (torch.zeros(3).double(), TypeError, "x: got torch.float64, takes float16"),
        ([1.0], TypeError, "x: got a list, takes a torch.Tensor"),
    ],
)
def test_wrong_arguments_of_quantize(x: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        quantize(x)
