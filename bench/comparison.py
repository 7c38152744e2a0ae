"""One question of speed: the same work done in several ways, on the same inputs, with a check of the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Plan:
    """A comparison before its inputs exist.

    Args:
        name: unique, for people and records.
        variants: what is compared, the baseline first.
        build: makes the comparison with its inputs.
    """

    name: str
    variants: tuple[str, ...]
    build: Callable[[], Comparison]


@dataclass(frozen=True)
class Comparison:
    """The same work in several ways.

    Args:
        name, variants: as planned; a variant is a function of the index of an input set that does the work once on
            that set and returns what it computed.
        input_sets: how many sets of inputs there are; timing rotates over them so that caches stay cold.
        exact: results of input set 0 in float64 (or whatever is trusted), in the variants' order of results.
        work: amount of work of one call, in `unit`s.
        unit: `images` or `bytes`.
        bytes_moved: fewest bytes that one call must move through memory; 0 where that is no useful bound.
        flops: fewest operations of its matrix products; 0 likewise.
        dtype: of the inputs; selects the ceiling for matrix products.
        capturable: whether a call can be captured in a CUDA graph.
        settings: sizes, for the record.
        allowance: how many times the baseline's error a variant may have.
    """

    name: str
    variants: dict[str, Callable[[int], Results]]
    input_sets: int
    exact: Callable[[], Results]
    work: float
    unit: str
    dtype: torch.dtype
    bytes_moved: float = 0.0
    flops: float = 0.0
    capturable: bool = True
    settings: dict[str, object] = field(default_factory=dict)
    allowance: float = 2.0

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))

    def errors(self) -> dict[str, float]:
        """Relative error ‖x − exact‖ / ‖exact‖ of every variant, the largest over its results; NaN counts as ∞."""
        exact = [x.double() for x in self.exact()]
        found = {}
        for name, variant in self.variants.items():
            worst = 0.0
            for result, reference in zip(variant(0), exact, strict=True):
                error = (result.detach().double() - reference).norm() / reference.norm().clamp_min(1e-30)
                worst = max(worst, error.item() if torch.isfinite(error) else float("inf"))
            found[name] = worst
        return found

    def wrong(self) -> dict[str, str]:
        """Variants whose results are worse than `allowance` times the baseline's error, and by how much.

        The baseline may round luckily; four units in the last place, or 1e-5, are allowed beside its error.
        """
        errors = self.errors()
        limit = self.allowance * errors[self.baseline] + max(1e-5, 4 * torch.finfo(self.dtype).eps)
        return {
            name: f"relative error {error:.2e} exceeds {limit:.2e}"
            for name, error in errors.items()
            if not error <= limit
        }
