"""Argument errors: which argument, what it got, what it takes, what to do."""

from __future__ import annotations

import torch


def message(argument: str, got: object, takes: str, remedy: str = "") -> str:
    """Build the one sentence that every argument error of this package consists of.

    Args:
        argument: name of the offending argument as the caller knows it.
        got: what was passed (a short description, not the whole object).
        takes: what the argument takes.
        remedy: what to do about it, as an imperative clause; empty when `takes` says it.

    Returns:
        For example ``mode: got 'gate', takes one of 'gated', 'concat', 'additive'``.
    """
    return f"{argument}: got {got}, takes {takes}" + (f"; {remedy}" if remedy else "")


def check_choice(argument: str, got: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `got` is one of `choices`."""
    if got not in choices:
        raise ValueError(message(argument, repr(got), "one of " + ", ".join(map(repr, choices))))


def check_tensor(argument: str, got: object) -> None:
    """Raise TypeError unless `got` is a torch.Tensor."""
    if not isinstance(got, torch.Tensor):
        raise TypeError(message(argument, f"a {type(got).__name__}", "a torch.Tensor"))


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype and device of a tensor in a few words, for error messages."""
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"
