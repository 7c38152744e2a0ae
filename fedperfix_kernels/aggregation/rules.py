"""Robust and private means of uploads: check, choose an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from fedperfix_kernels.aggregation import composed, native_launch, reference
from fedperfix_kernels.aggregation import op as _registered  # noqa: F401  (defines torch.ops.fedperfix.*)
from fedperfix_kernels.aggregation.configs import MAX_CLIENTS
from fedperfix_kernels.aggregation.inputs import (
    check_center,
    check_integer,
    check_number,
    check_rows,
    checked_out,
    checked_weights,
    native_limit,
    refuse_overlap,
    shares_of,
)
from fedperfix_kernels.backends import resolve
from fedperfix_kernels.checks import message

_IMPLEMENTATIONS = {
    "reference": reference,
    "torch": composed,
    "native": native_launch,
    "triton": torch.ops.fedperfix,
}


def median(uploads: Tensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Coordinate-wise median of K uploads, unweighted (Yin et al., ICML 2018).

    Of an even number, the mean of the two values in the middle. Every upload is read once. A coordinate where any
    upload is NaN is NaN; an infinite value is an extreme one like others.

    Args:
        uploads: [K, P], innermost stride 1; at most 128 clients with the triton backend.
        out: [P], contiguous, to write into.
        backend: `auto`, `triton`, `native`, `torch` or `reference`; None is `auto`.

    Returns:
        `out`, or a new tensor [P] of the uploads' dtype.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    check_rows("uploads", uploads)
    return trimmed_mean(uploads, (uploads.shape[0] - 1) // 2, out=out, backend=backend)


@torch.no_grad()
def trimmed_mean(uploads: Tensor, trim: int, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Coordinate-wise mean without the `trim` smallest and largest values, unweighted (Yin et al., ICML 2018).

    Every upload is read once. A coordinate where any upload is NaN is NaN; an infinite value is an extreme one like
    others.

    Args:
        uploads: [K, P], innermost stride 1; at most 128 clients with the triton backend.
        trim: how many values are left out at each end, less than K / 2. Yin et al. take at least the number of
            byzantine clients.
        out: [P], contiguous, to write into.
        backend: `auto`, `triton`, `native`, `torch` or `reference`; None is `auto`.

    Returns:
        `out`, or a new tensor [P] of the uploads' dtype.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    check_rows("uploads", uploads)
    clients = uploads.shape[0]
    check_integer("trim", trim, 0, (clients - 1) // 2, f"there are {clients} uploads")
    backend = resolve(backend, uploads.device, native_limit(uploads))
    _check_triton(uploads, backend, MAX_CLIENTS)
    out = checked_out(out, uploads, (uploads.dtype,))
    if uploads.shape[1]:
        _IMPLEMENTATIONS[backend].trimmed_mean(uploads, trim, out)
    return out


@torch.no_grad()
def clipped_mean(
    uploads: Tensor,
    weights: object,
    center: Tensor,
    max_norm: float,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted mean of updates scaled to a norm of at most `max_norm` (Sun et al., 2019, arXiv:1911.07963).

    center + Σ_k share_k · min(1, max_norm / ‖x_k − center‖) · (x_k − center). Two passes over the uploads: the
    norms must be known before the first sum. A non-finite upload reaches the result.

    Args:
        uploads: [K, P], innermost stride 1.
        weights: [K], non-negative and finite with a sum above 0; read on the host.
        center: [P], contiguous, the uploads' dtype: the global model that the clients started from.
        max_norm: largest Euclidean norm of an update, above 0.
        out: [P], contiguous, to write into; not `center`.
        backend: `auto`, `triton`, `native`, `torch` or `reference`; None is `auto`.

    Returns:
        `out`, or a new tensor [P] of the uploads' dtype.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    check_rows("uploads", uploads)
    weights, per_layer = checked_weights(weights, uploads.shape[0], 1)
    if per_layer:
        raise ValueError(message("weights", f"shape {tuple(weights.shape)}", f"shape [{uploads.shape[0]}]"))
    shares = shares_of(weights, uploads.dtype, uploads.device)[:, 0]
    return _clipped(uploads, shares, center, max_norm, 0.0, 0, out, backend)


@torch.no_grad()
def noisy_mean(
    uploads: Tensor,
    center: Tensor,
    max_norm: float,
    noise_multiplier: float,
    seed: int,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Unweighted clipped mean plus Gaussian noise, for simulating DP-FedAvg (McMahan et al., ICLR 2018).

    The noise has the standard deviation noise_multiplier · max_norm / K in every coordinate and is added in the
    pass that forms the mean. It is NOT cryptographic: whoever knows or guesses the seed subtracts it, so this
    measures what privacy costs in accuracy and protects nobody. The backends' generators differ: equal seeds give
    equal bits with one backend on one kind of device, and different noise with another.

    Args:
        uploads: [K, P], innermost stride 1.
        center: [P], contiguous, the uploads' dtype: the global model that the clients started from.
        max_norm: largest Euclidean norm of an update, above 0.
        noise_multiplier: standard deviation of the noise in the sum over clients, in `max_norm`; at least 0.
        seed: of the noise, from 0 to 2^63 − 1; a new one every round.
        out: [P], contiguous, to write into; not `center`.
        backend: `auto`, `triton`, `native`, `torch` or `reference`; None is `auto`.

    Returns:
        `out`, or a new tensor [P] of the uploads' dtype.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    check_rows("uploads", uploads)
    check_number("noise_multiplier", noise_multiplier, positive=False)
    check_number("max_norm", max_norm, positive=True)
    check_integer("seed", seed, 0, 2**63 - 1)
    clients = uploads.shape[0]
    shares = shares_of(torch.ones(clients, dtype=torch.float64), uploads.dtype, uploads.device)
    std = noise_multiplier * max_norm / clients
    return _clipped(uploads, shares, center, max_norm, std, seed, out, backend)


@torch.no_grad()
def krum(
    uploads: Tensor,
    center: Tensor,
    byzantine: int,
    select: int = 1,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Krum, or Multi-Krum for `select` > 1: the mean of the uploads nearest to their neighbours (Blanchard et al.,
    NeurIPS 2017).

    An upload's score is the sum of its K − byzantine − 2 smallest squared distances to others; the `select` lowest
    scores are chosen, of equal ones the first clients. One pass over the uploads for the distances, which are
    formed from the updates relative to `center` so that they do not drown in the size of the model, and one over
    the chosen ones. Non-finite uploads are infinitely far from all others. The scores are read on the host.

    Args:
        uploads: [K, P], innermost stride 1; at most 128 clients with the triton backend.
        center: [P], contiguous, the uploads' dtype: the global model that the clients started from.
        byzantine: how many clients may be hostile; K is at least 2 · byzantine + 3.
        select: how many uploads are averaged, at most K − byzantine.
        out: [P], contiguous, to write into.
        backend: `auto`, `triton`, `native`, `torch` or `reference`; None is `auto`.

    Returns:
        `out` or a new tensor [P] of the uploads' dtype, and the chosen clients [select], best first, int64 on the
        uploads' device.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value, or too many non-finite
            uploads to choose `select` others; the message names it.
    """
    check_rows("uploads", uploads)
    clients = uploads.shape[0]
    if clients < 3:
        raise ValueError(message("uploads", f"{clients} clients", "at least 3 for Krum"))
    check_integer("byzantine", byzantine, 0, (clients - 3) // 2, f"there are {clients} uploads")
    check_integer("select", select, 1, clients - byzantine, f"{byzantine} of {clients} uploads may be hostile")
    check_center(center, uploads)
    backend = resolve(backend, uploads.device, native_limit(uploads))
    _check_triton(uploads, backend, MAX_CLIENTS)
    out = checked_out(out, uploads, (uploads.dtype,))
    chosen = _nearest(_squared_distances(uploads, center, backend), byzantine, select)
    _mean_of([uploads[k] for k in chosen], out, backend)
    return out, torch.tensor(chosen, device=uploads.device)


def _check_triton(uploads: Tensor, backend: str, clients: int | None = None) -> None:
    """These kernels compute in float32, and some hold all clients in one program."""
    if backend != "triton":
        return
    remedy = "use backend='torch'"
    if uploads.dtype == torch.float64:
        takes = "float16, bfloat16 or float32 with the triton backend"
        raise TypeError(message("uploads", "float64", takes, remedy))
    if clients is not None and uploads.shape[0] > clients:
        takes = f"at most {clients} with the triton backend"
        raise ValueError(message("uploads", f"{uploads.shape[0]} clients", takes, remedy))


def _clipped(
    uploads: Tensor,
    shares: Tensor,
    center: Tensor,
    max_norm: float,
    std: float,
    seed: int,
    out: Tensor | None,
    backend: str | None,
) -> Tensor:
    """The clipped mean with shares [K] or [K, 1], plus noise."""
    check_number("max_norm", max_norm, positive=True)
    check_center(center, uploads)
    backend = resolve(backend, uploads.device, native_limit(uploads))
    _check_triton(uploads, backend)
    out = checked_out(out, uploads, (uploads.dtype,))
    refuse_overlap("out", out, center, "memory of center")
    if uploads.shape[1] == 0:
        return out
    operations = _IMPLEMENTATIONS[backend]
    norms = operations.squared_norms(uploads, center).sqrt()
    scaled = shares.flatten() * (max_norm / norms.clamp_min(max_norm)).to(shares.dtype)
    operations.shifted_mean(uploads, center, scaled, std, seed, out)
    return out


def _squared_distances(uploads: Tensor, center: Tensor, backend: str) -> Tensor:
    """Float64 [K, K] on the CPU; infinite where it is not finite."""
    if backend == "reference":
        distances = reference.squared_distances(uploads, center)
    else:
        gram = _IMPLEMENTATIONS[backend].gram(uploads, center)
        norms = gram.diagonal()
        distances = (norms[:, None] + norms - 2 * gram).clamp_min(0)
    return distances.cpu().nan_to_num(nan=torch.inf, posinf=torch.inf)


def _nearest(distances: Tensor, byzantine: int, select: int) -> list[int]:
    """The `select` clients with the lowest sums of their K − byzantine − 2 smallest distances [K, K] to others."""
    others = distances.clone().fill_diagonal_(torch.inf)
    neighbours = len(distances) - byzantine - 2
    scores = others.sort(1).values[:, :neighbours].sum(1)
    chosen = scores.argsort(stable=True)[:select]
    if not bool(scores[chosen].isfinite().all()):
        got = f"only {int(scores.isfinite().sum())} clients near enough to others"
        raise ValueError(message("uploads", got, f"at least select={select}", "leave non-finite uploads out"))
    return chosen.tolist()


def _mean_of(rows: list[Tensor], out: Tensor, backend: str) -> None:
    shares = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    if not out.numel():
        return
    if backend == "reference":
        reference.weighted_mean(rows, shares.tolist(), out)
    elif backend == "torch":
        composed.weighted_mean(rows, shares_of(shares, out.dtype, torch.device("cpu")), out, None)
    elif backend == "native":
        native_launch.aggregate_tensors(
            [[row] for row in rows], shares_of(shares[:, None], out.dtype, out.device), [out], None
        )
    else:
        torch.ops.fedperfix.aggregate_tensors(rows, shares_of(shares[:, None], out.dtype, out.device), [out], None)
