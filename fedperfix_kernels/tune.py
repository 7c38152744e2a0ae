"""Measure the attention kernels' launch configurations on this GPU and write its section of the table.

`python -m fedperfix_kernels.tune` times the candidates at one size per bucket of tokens, keeps a candidate only if
its results are right, and writes `attention/configs.json` after every bucket, so that a run that is cut short loses
nothing. Users never need it: the table is part of the package.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedperfix_kernels.attention import configs, packed_prefix_attention
from fedperfix_kernels.attention.configs import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    BACKWARD_WHOLE,
    BUCKETS,
    FORWARD,
    HALF,
    LaunchConfig,
)
from fedperfix_kernels.checks import message

# One size of a ViT in each bucket: 224 px in patches of 32, 32 px in patches of 4, 224 px in patches of 16, of 14,
# and 384 px in patches of 16.
TOKENS = (50, 65, 197, 257, 577)
# A candidate must beat the entry in force by this much: smaller differences are noise.
_GAIN = 0.02
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Size:
    """What is timed: batch of images, heads, tokens, head width, prefix keys (0: one per token)."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    prefix_len: int = 0


Timer = Callable[[Callable[[], object]], float]


def candidates(kernel: str, head_dim: int) -> Iterator[LaunchConfig]:
    """The configurations worth trying for one kernel and head width."""
    if kernel == BACKWARD_WHOLE:
        for block_m, warps, tails in itertools.product((16, 32, 64), (4, 8), (False, True)):
            yield LaunchConfig(block_m, 0, warps, 1, tails)
        return
    wide = head_dim > 64
    blocks = ((64, 32), (64, 64), (32, 64), (128, 64), (128, 32), (128, 128))[: 4 if wide else 6]
    for (block_m, block_n), stages in itertools.product(blocks, (1, 2, 3)):
        warps = 8 if wide or block_m * block_n > 64 * 64 else 4
        for tails in (False,) if kernel == BACKWARD_KEYS else (False, True):
            yield LaunchConfig(block_m, block_n, warps, stages, tails)


class Tuner:
    """Finds the fastest configurations of one architecture.

    Args:
        content: the table to begin with; `section` of it is changed.
        section: the architecture's name in the table.
        device: where to run.
        dtype: of the inputs; its kind of products is what is tuned.
        timer: seconds of one call of a function.
        report: told one line per decision.
    """

    def __init__(
        self,
        content: dict[str, Any],
        section: str,
        device: torch.device,
        dtype: torch.dtype,
        timer: Timer,
        report: Callable[[str], None] = print,
    ) -> None:
        self.content = copy.deepcopy(content)
        self.section = section
        self.device = device
        self.dtype = dtype
        self.timer = timer
        self.report = report

    def tune(self, size: Size, limit: Callable[[], bool] = lambda: False) -> None:
        """Choose all configurations of the bucket of one size; stop early when `limit()` is true."""
        inputs = _inputs(size, self.dtype, self.device)
        exact = _results(inputs, "reference")
        bucket = configs._bucket(max(size.tokens, size.prefix_len))
        for kernel in (FORWARD, BACKWARD_KEYS, BACKWARD_QUERIES, BACKWARD_WHOLE):
            # Wide heads in one kernel fault on sm_90 under Triton 3.6 (attention/NOTES.md); that ends all work.
            faults = self.section == "sm_90" and size.head_dim > 32
            if kernel == BACKWARD_WHOLE and (faults or bucket not in map(str, BUCKETS[:3])):
                continue
            self._choose(kernel, size, bucket, inputs, exact, limit)

    def _choose(
        self,
        kernel: str,
        size: Size,
        bucket: str,
        inputs: tuple[Tensor, ...],
        exact: tuple[Tensor, ...],
        limit: Callable[[], bool],
    ) -> None:
        entries = self._entries(kernel, size.head_dim)
        before = entries.get(bucket)
        if kernel in (BACKWARD_KEYS, BACKWARD_QUERIES):  # they run only where the one-kernel form does not
            self._entries(BACKWARD_WHOLE, size.head_dim)[bucket] = []
        call = _forward(inputs) if kernel == FORWARD else _backward(inputs)
        with self._in_force():
            best_time = self.timer(call)
        best: list[int] | None = before
        for config in candidates(kernel, size.head_dim):
            if limit():
                break
            entries[bucket] = configs.entry(config)
            try:
                with self._in_force():
                    if not _right(_results(inputs, "triton"), exact):
                        self.report(f"{kernel} {bucket}: {config} computes something else")
                        continue
                    seconds = self.timer(call)
            except Exception as error:  # does not fit this GPU: too much shared memory or too many registers
                self.report(f"{kernel} {bucket}: {config} does not run ({str(error).splitlines()[0][:80]})")
                continue
            if seconds < best_time * (1 - _GAIN):
                best, best_time = configs.entry(config), seconds
        if best is None:
            entries.pop(bucket, None)
        else:
            entries[bucket] = best
        self.report(
            f"{kernel}, D={size.head_dim}, up to {bucket}: {best or 'as in base'}, {best_time * 1e6:.1f} µs"
        )

    def _entries(self, kernel: str, head_dim: int) -> dict[str, list[int]]:
        kind = HALF if self.dtype in (torch.float16, torch.bfloat16) else configs.IEEE
        width = str(configs.padded_head_dim(head_dim))
        section = self.content.setdefault(self.section, {})
        return section.setdefault(kind, {}).setdefault(kernel, {}).setdefault(width, {})

    @contextmanager
    def _in_force(self) -> Iterator[None]:
        """Let the kernels read this table instead of the package's."""
        packaged = configs.table
        configs.table = lambda: self.content
        configs._lookup.cache_clear()
        try:
            yield
        finally:
            configs.table = packaged
            configs._lookup.cache_clear()


def write(content: dict[str, Any], path: Path) -> None:
    """Write the table at once or not at all; sections in which nothing is left are dropped."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(configs.formatted(_pruned(content)))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _pruned(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    kept = {key: _pruned(value) for key, value in content.items()}
    return {key: value for key, value in kept.items() if value != {}}


def _inputs(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    length, rows = (size.prefix_len, 1) if size.prefix_len else (size.tokens, size.batch)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

    gate = (torch.rand(size.heads, generator=generator, device=device) + 0.5).requires_grad_()
    qkv = normal(size.batch, size.tokens, 3, size.heads, size.head_dim)
    return qkv, normal(rows, length, 2, size.heads, size.head_dim), gate


def _results(inputs: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
    """out and the gradients of |out|²/2: no sum among them cancels, so relative errors mean something."""
    dtype = torch.float32 if backend == "reference" else inputs[0].dtype
    leaves = [x.detach().to(dtype if x.dim() > 1 else x.dtype).requires_grad_() for x in inputs]
    out = packed_prefix_attention(*leaves, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, out.detach())


def _right(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> bool:
    errors = ((x.float() - y).norm() / y.norm() for x, y in zip(found, exact, strict=True))
    return all(bool(error <= _TOLERANCE) for error in errors)


def _forward(inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return packed_prefix_attention(*inputs, backend="triton")

    return call


def _backward(inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    out = packed_prefix_attention(*inputs, backend="triton")
    return lambda: torch.autograd.grad(out, inputs, out.detach(), retain_graph=True)


def _gpu_timer(call: Callable[[], object]) -> float:
    import triton

    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median") / 1e3


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 after the table is written, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m fedperfix_kernels.tune", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="one size per bucket")
    parser.add_argument("--head-dim", type=int, nargs="+", default=(64,))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; finished buckets are kept")
    parser.add_argument("--output", type=Path, default=configs.TABLE, help="default: the package's own table")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        takes = "a GPU that Triton supports"
        print(message("device", "none", takes, "run this where torch.cuda.is_available()"), file=sys.stderr)
        return 2
    device = torch.device("cuda")
    deadline = time.monotonic() + arguments.time_limit
    section = configs.architecture(device)
    content = configs.table()
    for head_dim, tokens in itertools.product(arguments.head_dim, arguments.tokens):
        if time.monotonic() > deadline:
            print("the time is used up; run again with --tokens for the rest", file=sys.stderr)
            break
        tuner = Tuner(content, section, device, getattr(torch, arguments.dtype), _gpu_timer)
        size = Size(arguments.batch, arguments.heads, tokens, head_dim)
        tuner.tune(size, limit=lambda: time.monotonic() > deadline)
        content = tuner.content
        write(content, arguments.output)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
