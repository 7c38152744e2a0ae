"""The weighted mean over clients against NumPy in float64."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from bench.timing import peak_memory
from fedperfix_kernels import BlockLayout, aggregate
from fedperfix_kernels.arena import BLOCK
from tests.conftest import BACKENDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def numpy_mean(uploads: torch.Tensor, weights: np.ndarray) -> np.ndarray:
    rows = uploads.double().cpu().numpy()
    return np.average(rows, axis=0, weights=weights)


def bound(uploads: torch.Tensor, accumulate: float = 2**-23) -> float:
    """Rounding of the result to its storage type, and of K float32 products and sums."""
    largest = uploads.double().abs().max().item()
    return largest * (torch.finfo(uploads.dtype).eps + uploads.shape[0] * accumulate)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("clients", "numel"), [(1, 1), (2, 7), (7, BLOCK), (8, BLOCK + 1), (33, 3001), (65, 17)])
@pytest.mark.usefixtures("poisoned")
def test_weights_per_client(clients: int, numel: int, dtype: torch.dtype, backend: str, device) -> None:
    generator = torch.Generator().manual_seed(clients)
    uploads = torch.randn(clients, numel, generator=generator).to(dtype).to(device)
    weights = torch.rand(clients, generator=generator) + 0.1
    mean = aggregate(uploads, weights, backend=backend)
    assert (mean.dtype, mean.shape) == (dtype, (numel,))
    error = np.abs(mean.double().cpu().numpy() - numpy_mean(uploads, weights.double().numpy())).max()
    assert error <= bound(uploads)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_weights_per_layer(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    layout = BlockLayout.of({"a": torch.Size([BLOCK + 3]), "b": torch.Size([5]), "c": torch.Size([2, 3])})
    generator = torch.Generator().manual_seed(0)
    uploads = torch.randn(5, layout.numel, generator=generator).to(dtype).to(device)
    weights = torch.rand(5, 3, generator=generator)
    weights[2, 1] = 0
    mean = aggregate(uploads, weights, layout=layout, backend=backend)
    ends = (*layout.offsets[1:], layout.numel)
    for layer, (start, end) in enumerate(zip(layout.offsets, ends, strict=True)):
        expected = numpy_mean(uploads[:, start:end], weights[:, layer].double().numpy())
        assert np.abs(mean[start:end].double().cpu().numpy() - expected).max() <= bound(uploads)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_by_hand(backend: str, device: torch.device) -> None:
    """Two clients with 1 and 3 images: FedAvg's m_k / Σ m."""
    uploads = torch.tensor([[0.0, 8.0, -4.0], [4.0, 0.0, 4.0]], device=device)
    assert aggregate(uploads, [1, 3], backend=backend).tolist() == [3.0, 2.0, 2.0]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("columns", [slice(0, 2000), slice(1, 2001), slice(3, 4)])
def test_rows_of_a_wider_buffer_into_a_given_output(columns: slice, backend: str, device) -> None:
    """Uploads as slices of [K, P_total] rows, at addresses that are and are not multiples of 16 bytes."""
    buffer = torch.randn(4, 2500, device=device)
    uploads = buffer[:, columns]
    out = torch.full((uploads.shape[1],), torch.nan, device=device)
    assert aggregate(uploads, [1, 2, 3, 4], out=out, backend=backend) is out
    expected = numpy_mean(uploads, np.array([1, 2, 3, 4]))
    assert np.abs(out.double().cpu().numpy() - expected).max() <= bound(uploads)


def state_dicts(clients: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"weight": (33, 65), "bias": (7,), "temperature": (), "empty": (0, 4), "half": (1025,)}
    return [
        {
            name: torch.randn(shape, generator=generator).to(torch.float16 if name == "half" else torch.float32)
            .to(device)
            for name, shape in shapes.items()
        }
        for _ in range(clients)
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_state_dicts(per_layer: bool, backend: str, device: torch.device) -> None:
    uploads = state_dicts(5, device)
    weights = torch.rand(5, 5) + 0.1 if per_layer else torch.rand(5) + 0.1
    mean = aggregate(uploads, weights, backend=backend)
    assert list(mean) == list(uploads[0])
    for layer, name in enumerate(mean):
        stacked = torch.stack([client[name] for client in uploads]).reshape(len(uploads), -1)
        column = weights[:, layer] if per_layer else weights
        assert mean[name].shape == uploads[0][name].shape
        if stacked.numel():
            expected = numpy_mean(stacked, column.double().numpy()).reshape(mean[name].shape)
            assert np.abs(mean[name].double().cpu().numpy() - expected).max() <= bound(stacked), name


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_state_dicts_into_given_tensors_and_transposed_uploads(backend: str, device: torch.device) -> None:
    uploads = [{"w": torch.randn(6, 4, device=device).T} for _ in range(3)]
    out = {"w": torch.full((4, 6), torch.nan, device=device)}
    mean = aggregate(uploads, [1, 1, 2], out=out, backend=backend)
    assert mean["w"] is out["w"]
    expected = (uploads[0]["w"] + uploads[1]["w"] + 2 * uploads[2]["w"]) / 4
    torch.testing.assert_close(mean["w"], expected)


def views(first: int, last: int) -> torch.Tensor:
    return MEMORY[first:last]


MEMORY = torch.zeros(100)
OVERLAPS = [
    ([{"a": views(0, 10)}, {"a": views(10, 20)}], {"a": views(10, 20)}, "out['a']"),  # the second client's
    ([{"a": views(0, 10)}, {"a": views(10, 20)}], {"a": views(19, 29)}, "out['a']"),  # in part
    (
        [{"a": views(0, 9), "b": views(10, 19)}],
        {"a": views(30, 39), "b": views(8, 17)},
        "out['b']",
    ),  # another name's
    ([{"a": views(0, 9), "b": views(10, 19)}], {"a": views(30, 39), "b": views(38, 47)}, "out['b']"),  # two results
]


@pytest.mark.parametrize(("uploads", "out", "argument"), OVERLAPS)
def test_results_may_not_overlap_uploads_or_each_other(uploads, out, argument: str) -> None:
    sentence = f"{argument}: got memory of an upload or of another result, takes memory of its own"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        aggregate(uploads, [1] * len(uploads), out=out)


def test_rows_may_not_overlap_the_result_either() -> None:
    """Also where two tensors with storages of their own share memory; apart in one storage is fine."""
    array = np.zeros(40, dtype=np.float32)
    uploads, out = torch.from_numpy(array[:20]).view(2, 10), torch.from_numpy(array[19:29])
    with pytest.raises(ValueError, match="out: got a view of the uploads' memory"):
        aggregate(uploads, [1, 1], out=out)
    memory = torch.ones(30)
    assert aggregate(memory[:20].view(2, 10), [1, 1], out=memory[20:]).tolist() == [1.0] * 10


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_the_same_input_gives_the_same_bits(backend: str, device: torch.device) -> None:
    uploads = torch.randn(9, 5000, device=device)
    weights = torch.rand(9)
    first = aggregate(uploads, weights, backend=backend)
    assert all(torch.equal(first, aggregate(uploads, weights, backend=backend)) for _ in range(3))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_nan_reaches_the_result(backend: str, device: torch.device) -> None:
    """Nothing is masked silently: a non-finite upload reaches the result, and is for the caller to leave out."""
    uploads = torch.ones(3, 10, device=device)
    uploads[1, 4] = torch.nan
    assert aggregate(uploads, [1, 1, 1], backend=backend).isnan().tolist() == [i == 4 for i in range(10)]


@pytest.mark.parametrize("backend", ["torch", "reference"])  # Triton's interpreter truncates bfloat16
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clients", [3, 49, 127])
def test_the_mean_of_equal_uploads_is_the_upload(clients: int, dtype: torch.dtype, backend: str, device) -> None:
    """So shares are not rounded to half precision on the way, and sum to 1."""
    upload = torch.randn(2 * BLOCK + 5, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    mean = aggregate(upload.expand(clients, -1), torch.arange(1, clients + 1), backend=backend)
    error = (mean.double() - upload.double()).abs()
    assert (error <= upload.double().abs() * (clients * 2**-23 if dtype == torch.float32 else 0)).all()


@pytest.mark.parametrize("backend", BACKENDS[:-1], indirect=True)
def test_no_temporary_of_the_uploads_size(backend: str, device: torch.device) -> None:
    clients = 16
    uploads = torch.randn(clients, 300 * BLOCK, device=device).to(torch.bfloat16)
    out = torch.empty(300 * BLOCK, dtype=torch.bfloat16, device=device)
    peak = peak_memory(lambda _: aggregate(uploads, [1.0] * clients, out=out, backend=backend), device)
    assert 0 < peak < uploads.nbytes


def test_peak_memory_sees_a_temporary(device: torch.device) -> None:
    uploads = torch.randn(16, 300 * BLOCK, device=device)
    assert peak_memory(lambda _: (uploads * 2).sum(0), device) >= uploads.nbytes


def test_opcheck(device: torch.device) -> None:
    layout = BlockLayout.of({"a": torch.Size([BLOCK + 3]), "b": torch.Size([5])})
    uploads = torch.randn(3, layout.numel, device=device)
    out = torch.empty(layout.numel, device=device)
    shares = torch.full((3, 1), 1 / 3, device=device)
    ops = torch.ops.fedperfix
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.aggregate_rows, (uploads, shares, None, None, out, None), test_utils=tests)
    per_layer = (
        uploads,
        shares.expand(3, 2).contiguous(),
        layout.block_layer(device),
        None,
        out,
        torch.zeros(3, dtype=torch.bool, device=device),
    )
    torch.library.opcheck(ops.aggregate_rows, per_layer, test_utils=tests)


GOOD = torch.zeros(2, 5)
ERRORS = [
    ({"uploads": torch.zeros(5), "weights": [1]}, ValueError, "uploads: got shape (5,)"),
    ({"uploads": [], "weights": []}, TypeError, "uploads: got a list, takes a tensor [K, P]"),
    ({"uploads": GOOD.long(), "weights": [1, 1]}, TypeError, "uploads: got torch.int64, takes a floating dtype"),
    ({"uploads": torch.zeros(5, 2).T, "weights": [1, 1]}, ValueError, "takes an innermost stride of 1"),
    ({"uploads": GOOD, "weights": [1, 1, 1]}, ValueError, "weights: got shape (3,), takes shape [2]"),
    ({"uploads": GOOD, "weights": [[1], [1]]}, ValueError, "takes shape [K] without a layout"),
    ({"uploads": GOOD, "weights": [1, -1]}, ValueError, "weights: got a negative or non-finite weight"),
    ({"uploads": GOOD, "weights": [1, float("nan")]}, ValueError, "weights: got a negative or non-finite weight"),
    ({"uploads": GOOD, "weights": [0, 0]}, ValueError, "weights: got weights that sum to 0"),
    ({"uploads": GOOD, "weights": [1, 1], "out": torch.zeros(4)}, ValueError, "out: got shape (4,)"),
    ({"uploads": GOOD, "weights": [1, 1], "out": GOOD[0]}, ValueError, "out: got a view of the uploads' memory"),
    ({"uploads": GOOD, "weights": [1, 1], "backend": "numpy"}, ValueError, "backend: got 'numpy'"),
    ({"uploads": GOOD, "weights": [1, 1], "layout": BlockLayout.of({})}, ValueError, "layout: got 0 elements"),
    ({"uploads": [{"a": GOOD}, {"b": GOOD}], "weights": [1, 1]}, ValueError, "uploads[1]: got other names: a, b"),
    ({"uploads": [{"a": GOOD}, {"a": GOOD[0]}], "weights": [1, 1]}, ValueError, "uploads[1]['a']: got shape (5,)"),
    ({"uploads": [{"n": GOOD.long()}], "weights": [1]}, TypeError, "uploads[0]['n']: got torch.int64"),
    ({"uploads": [{}], "weights": [1]}, ValueError, "uploads[0]: got an empty state dict"),
    ({"uploads": [{"a": GOOD}], "weights": [1], "out": {"b": GOOD}}, ValueError, "out: got a dict, takes"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS, ids=[text for *_, text in ERRORS])
def test_wrong_arguments(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        aggregate(arguments.pop("uploads"), arguments.pop("weights"), **arguments)
