"""Which uploads the server takes: a client whose update cannot be used is left out and named."""

from __future__ import annotations

import torch
from torch import Tensor

from fedperfix.engine.cohort import Turns


def upload_sizes(turns: Turns, start: Tensor) -> Tensor:
    """How large the K clients' uploads are.

    Args:
        turns: of these clients.
        start: [P_shared], the global parameters that they started from.

    Returns:
        Float32 [K, 1 + len(turns.extra)] on the CPU: the Euclidean norm of the update of the shared parameters and
        of each extra tensor; infinite where the upload or what the client keeps is not finite.
    """
    tables = (turns.shared, *turns.extra.values())
    starts = (start, *(None for _ in turns.extra))
    sizes = torch.empty(len(turns.clients), len(tables))
    for column, (table, origin) in enumerate(zip(tables, starts, strict=True)):
        for row, upload in enumerate(table):
            sizes[row, column] = torch.linalg.vector_norm(upload if origin is None else upload - origin)
    finite = finite_rows(turns.rows, *turns.extra.values(), *turns.own.values())
    sizes[[row for row in range(len(turns.clients)) if row not in finite]] = torch.inf
    return sizes


def usable(sizes: Tensor, largest: float) -> list[int]:
    """Rows of the clients whose uploads can be used, in order.

    Args:
        sizes: [K, n] as from `upload_sizes`.
        largest: how many times the median over the clients with finite uploads a size may be.
    """
    good = sizes.isfinite().all(1)
    if good.any():
        medians = sizes[good].median(0).values  # of an even number the lower one
        good &= ((sizes <= largest * medians) | (medians == 0)).all(1)
    return good.nonzero().flatten().tolist()


def finite_rows(*tables: Tensor) -> list[int]:
    """Which rows are finite in all of these tensors [K, ...], without a copy of their size."""
    extremes = [
        torch.stack([torch.stack(torch.aminmax(row)) for row in table])  # a NaN is both; row by row is fastest
        for table in tables
        if table[0].numel()
    ]
    finite = torch.cat([values.float() for values in extremes], 1).isfinite().all(1).tolist()
    return [row for row, good in enumerate(finite) if good]
