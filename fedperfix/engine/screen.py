"""Which uploads the server takes: a client whose update cannot be used is left out and named."""

from __future__ import annotations

import torch
from torch import Tensor

from fedperfix.engine.cohort import Turns


def screen(turns: Turns) -> list[int]:
    """Rows of the clients whose upload and personal state are finite, in order."""
    return finite_rows(turns.rows, *turns.extra.values(), *turns.own.values())


def finite_rows(*tables: Tensor) -> list[int]:
    """Which rows are finite in all of these tensors [K, ...], without a copy of their size."""
    norms = [
        torch.linalg.vector_norm(table.reshape(len(table), -1), torch.inf, dim=1)
        for table in tables
        if table[0].numel()
    ]
    finite = torch.stack(norms).isfinite().all(0).tolist()
    return [row for row, good in enumerate(finite) if good]
