"""What is compared: one module per operation, each yielding `Plan`s for a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.comparison import Plan
from bench.comparisons.aggregation import aggregation_plans
from bench.comparisons.attention import attention_plans
from bench.comparisons.round import round_plans
from bench.comparisons.serving import serving_plans
from bench.comparisons.step import step_plans


def all_plans(device: torch.device) -> Iterator[Plan]:
    """Every comparison at the sizes that fit `device`."""
    yield from attention_plans(device)
    yield from aggregation_plans(device)
    yield from step_plans(device)
    yield from round_plans(device)
    yield from serving_plans(device)
