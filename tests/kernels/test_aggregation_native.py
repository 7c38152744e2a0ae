"""The native kernels of aggregation: every instruction set, odd sizes, threads, memory that must not be touched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedperfix_kernels import Quantized, aggregate, clipped_mean, krum, median, noisy_mean, quantize, trimmed_mean
from fedperfix_kernels.aggregation import composed, native_launch, reference
from fedperfix_kernels.arena import BLOCK

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CLIENTS = (*range(1, 10), 16, 17, 33, 129)
SIZES = (0, 1, 1023, 1024, 1025, 4097)

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The number of threads is what it was when a test is over."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def uploads_of(clients: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(clients, numel, generator=torch.Generator().manual_seed(clients)).to(dtype)


def assert_near(result: torch.Tensor, expected: torch.Tensor, clients: int) -> None:
    """Up to the rounding of the result, and of K products in float32."""
    tolerance = torch.finfo(expected.dtype).eps + clients * 2**-22
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.usefixtures("poisoned")
def test_every_size(clients: int, dtype: torch.dtype) -> None:
    weights = torch.arange(1.0, clients + 1)
    for numel in SIZES:
        uploads = uploads_of(clients, numel, dtype)
        for operation in (
            lambda x, backend: aggregate(x, weights, backend=backend),
            lambda x, backend: median(x, backend=backend),
            lambda x, backend: trimmed_mean(x, (clients - 1) // 4, backend=backend),
            lambda x, backend: clipped_mean(x, weights, x[0].clone(), 20.0, backend=backend),
        ):
            assert_near(operation(uploads, "native"), operation(uploads, "reference"), clients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clients", CLIENTS)
def test_sums_over_every_size(clients: int, dtype: torch.dtype) -> None:
    for numel in SIZES:
        uploads, center = uploads_of(clients, numel, dtype), uploads_of(1, numel, dtype)[0]
        updates = reference.updates(uploads, center).double()
        tolerance = {"rtol": 1e-6, "atol": 1e-6 * numel}
        torch.testing.assert_close(native_launch.gram(uploads, center), updates @ updates.T, **tolerance)
        expected = updates.square().sum(1)
        torch.testing.assert_close(native_launch.squared_norms(uploads, center), expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_bits_are_those_of_torch(dtype: torch.dtype) -> None:
    for numel in SIZES[1:]:
        x = uploads_of(1, numel, dtype)[0]
        native, torch_ = (quantize(x, backend=backend) for backend in ("native", "torch"))
        assert torch.equal(native.values, torch_.values)
        assert torch.equal(native.scales, torch_.scales)


@pytest.mark.parametrize("clients", CLIENTS)
def test_int8_of_every_size(clients: int) -> None:
    for numel in SIZES[1:]:
        uploads = Quantized.stack([quantize(row) for row in uploads_of(clients, numel)])
        native, expected = (
            aggregate(uploads, range(1, clients + 1), backend=backend) for backend in ("native", "reference")
        )
        assert_near(native, expected, clients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_the_bits(dtype: torch.dtype) -> None:
    uploads = uploads_of(9, 40 * BLOCK + 7, dtype)
    center = uploads.float().mean(0).to(dtype)
    quantized = Quantized.stack([quantize(row) for row in uploads])
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(
            [
                aggregate(uploads, range(1, 10), backend="native"),
                median(uploads, backend="native"),
                noisy_mean(uploads, center, 1.0, 1.0, 3, backend="native"),
                krum(uploads, center, 2, 3, backend="native")[0],
                aggregate(quantized, range(1, 10), backend="native"),
                native_launch.gram(uploads, center),
                native_launch.squared_norms(uploads, center),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_half_precision(dtype: torch.dtype) -> None:
    """Subnormal, infinite and NaN, next to any others."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    mixed = torch.stack([every, every.roll(7), every.roll(1031)])
    for uploads in (every.expand(3, -1), mixed):
        native, expected = (median(uploads, backend=backend) for backend in ("native", "torch"))
        torch.testing.assert_close(native, expected, rtol=0, atol=0, equal_nan=True)
    native = aggregate(mixed, [1, 2, 3], backend="native")
    expected = torch.stack([mixed[k].double() * (k + 1) / 6 for k in range(3)]).sum(0).to(dtype)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).smallest_normal}
    torch.testing.assert_close(native, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1025, (1 << 21) + 5])  # the larger result goes around the caches
def test_unaligned_rows_and_results(numel: int, dtype: torch.dtype) -> None:
    buffer = uploads_of(3, numel + 9, dtype)
    for shift in (0, 1, 7):
        uploads, memory = buffer[:, shift : shift + numel], torch.zeros(numel + 16, dtype=dtype)
        parts, out = uploads.clone().split(512 * BLOCK, 1), memory[shift : shift + numel]
        aggregate(uploads, [1, 2, 3], out=out, backend="native")
        assert torch.equal(out, torch.cat([aggregate(part, [1, 2, 3], backend="native") for part in parts]))
        median(uploads, out=out, backend="native")
        assert torch.equal(out, torch.cat([median(part, backend="native") for part in parts]))
        assert not memory[:shift].any()
        assert not memory[shift + numel :].any()


def test_tensors_of_many_sizes_in_one_call() -> None:
    sizes = (1, 4096, 0, 4097, 12288, 5)
    uploads = [{str(i): torch.randn(n) for i, n in enumerate(sizes)} for _ in range(5)]
    weights = torch.rand(5, len(sizes)) + 0.1
    native, expected = (aggregate(uploads, weights, backend=backend) for backend in ("native", "reference"))
    for name in native:
        assert_near(native[name], expected[name], 5)


def test_noise_has_the_bits_of_torch() -> None:
    zeros = torch.zeros(7, 70 * BLOCK + 13)
    native, torch_ = (noisy_mean(zeros, zeros[0].clone(), 1.0, 1.5, 9, backend=x) for x in ("native", "torch"))
    assert torch.equal(native, torch_)


def test_rows_far_apart(tmp_path: Path) -> None:
    """Their distance in elements, and in bytes, passes 2^31; the file between them has no content."""
    step, numel = 2**31 + 11, 1025
    storage = torch.UntypedStorage.from_file(str(tmp_path / "sparse"), True, 2 * (step + numel))
    uploads = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (2, numel), (step, 1))
    uploads.copy_(uploads_of(2, numel, torch.bfloat16))
    for operation in (lambda x, y: aggregate(x, [1, 3], backend=y), lambda x, y: median(x, backend=y)):
        assert_near(operation(uploads, "native"), operation(uploads.clone(), "torch"), 2)
    assert_near(native_launch.squared_norms(uploads, uploads[0]), composed.squared_norms(uploads, uploads[0]), 2)


def test_many_clients_of_one_row() -> None:
    """K · P passes 2^31; all rows are the same memory."""
    uploads = torch.ones(1, 4097).expand(2**19 + 1, -1)
    assert uploads.numel() > 2**31
    mean = aggregate(uploads, torch.ones(len(uploads)), backend="native")
    torch.testing.assert_close(mean, torch.ones(4097), rtol=1e-2, atol=0)


def test_float64_is_refused_and_auto_takes_torch() -> None:
    uploads = uploads_of(3, 5).double()
    sentence = "backend: got 'native', but uploads are float64 and native kernels compute in float32; use backend="
    for call in (
        lambda backend: aggregate(uploads, [1, 1, 1], backend=backend),
        lambda backend: aggregate([{"w": uploads}, {"w": uploads}], [1, 1], backend=backend)["w"],
        lambda backend: median(uploads, backend=backend),
        lambda backend: clipped_mean(uploads, [1, 1, 1], uploads[0].clone(), 1.0, backend=backend),
        lambda backend: krum(uploads, uploads[0].clone(), 0, backend=backend)[0],
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call("native")
        assert torch.equal(call("auto"), call("torch"))


def test_a_storage_that_was_made_smaller_is_refused() -> None:
    uploads = uploads_of(2, 2000)
    uploads.untyped_storage().resize_(100)
    with pytest.raises(RuntimeError, match="has lost its memory"):
        aggregate(uploads, [1, 1], backend="native")
