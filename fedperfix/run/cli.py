"""What every command of the package does with wrong input: one sentence on stderr, and exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fedperfix.config import ConfigError
from fedperfix.engine.group import Ended, ProcessLost
from fedperfix.run.checkpoint import CheckpointError
from fedperfix.run.metrics import MetricsError

# What the user can mend; anything else is a fault of the program and keeps its traceback.
USER_ERRORS = (ConfigError, CheckpointError, MetricsError, OSError, torch.OutOfMemoryError, ProcessLost)


class Command(Protocol):
    """The function behind a command line."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """From arguments, None for the process's own, to the exit code."""


def cli(run: Callable[[list[str]], int]) -> Command:
    """Make the function behind a command line from one that may raise `USER_ERRORS`.

    Args:
        run: from the arguments, without the program's name, to the exit code.

    Returns:
        The same for any sequence of arguments, None for the process's own; 2 for wrong input.
    """

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        return reported(lambda: run(list(sys.argv[1:] if argv is None else argv)))

    return main


def reported(work: Callable[[], int]) -> int:
    """The exit code of `work`: what it returns, or 2 after one of `USER_ERRORS`, whose sentence is printed."""
    try:
        return work()
    except Ended as ended:  # another process says why
        return ended.code
    except USER_ERRORS as error:
        print(f"fedperfix: error: {sentence(error)}", file=sys.stderr)
        return 2


def explain_error(error: BaseException) -> str | None:
    """The sentence of an error that the user can mend; None for a fault of the program."""
    return sentence(error) if isinstance(error, USER_ERRORS) else None


def sentence(error: BaseException) -> str:
    """An error of `USER_ERRORS` as one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "--batch-size: the GPU's memory is full; use a smaller batch, --model, or --image-size"
    if isinstance(error, OSError):
        where = f" '{error.filename}'" if error.filename else ""
        return f"cannot write or read{where}: {error.strerror or error}"
    return " ".join(str(error).split())
