"""One question of speed: the same work done in several ways, on the same inputs, with a check of the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


class Unavailable(Exception):
    """A variant cannot run this case on this machine; the text says why. Not a failure, but no speed either."""


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
            that set and returns what it computed. It raises `Unavailable` where it cannot run.
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
        parts: pieces of the variant `whole`, each timed alone to say where its time goes; capturable on a GPU.
        whole: the variant that the parts belong to.
        unweighed: variants that hold their memory between calls, so that a call's peak says nothing.
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
    parts: dict[str, Callable[[int], object]] = field(default_factory=dict)
    whole: str = ""
    unweighed: tuple[str, ...] = ()

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))

    def refused(self) -> dict[str, dict[str, str]]:
        """Variants that get no speed, and why.

        A result may have `allowance` times the baseline's error. The baseline may round luckily; four units in the
        last place, or 1e-5, are allowed beside its error.

        Returns:
            Per variant {"unavailable": why} where it cannot run the case, {"failed": why} where it raised anything
            else or computed something wrong.
        """
        errors: dict[str, float] = {}
        refused: dict[str, dict[str, str]] = {}
        exact = [x.double() for x in self.exact()]
        for name, variant in self.variants.items():
            try:
                errors[name] = _error(variant(0), exact)
            except Unavailable as reason:
                refused[name] = {"unavailable": str(reason)}
            except Exception as error:  # one variant's failure must not cost the others' figures
                refused[name] = {"failed": f"{type(error).__name__}: {_first_line(error)}"}
        limit = self.allowance * errors.get(self.baseline, 0.0) + max(1e-5, 4 * torch.finfo(self.dtype).eps)
        for name, error in errors.items():
            if not error <= limit:
                refused[name] = {"failed": f"relative error {error:.2e} exceeds {limit:.2e}"}
        return refused


def _error(results: Results, exact: list[Tensor]) -> float:
    """Relative error ‖x − exact‖ / ‖exact‖, the largest over the results; NaN counts as ∞."""
    worst = 0.0
    for result, reference in zip(results, exact, strict=True):
        error = (result.detach().double() - reference).norm() / reference.norm().clamp_min(1e-30)
        worst = max(worst, error.item() if torch.isfinite(error) else float("inf"))
    return worst


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def compiled(function: Any) -> Any:
    """`function` (or module) under torch.compile for fixed shapes.

    A graph break, or more graphs than Dynamo keeps, is then an error: neither may quietly run eager code under the
    name of compiled code.
    """
    return torch.compile(function, dynamic=False, fullgraph=True)
