"""Which of PyTorch's two products is faster in float32 linear layers here: `python -m bench.linear`.

Forward and backward of one layer, by `F.linear` (MKL in most builds) and by oneDNN, at the sizes of a training step
of ViT-Ti and ViT-S and of the small ViT of the first run. The two take turns, so that drift meets both alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.record import device_name
from fedperfix_kernels.linear import linear, onednn_obstacle, resolve_linear

# Model: images in a batch, tokens of an image, and C_in and C_out of the layers of a block.
MODELS = {
    "vit-mini, 28 px": (32, 50, ((96, 288), (96, 96), (96, 384), (384, 96))),
    "ViT-Ti/4, 32 px": (16, 65, ((192, 576), (192, 192), (192, 768), (768, 192))),
    "ViT-S/16, 224 px": (8, 197, ((384, 1152), (384, 384), (384, 1536), (1536, 384))),
}
_Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(argv: list[str] | None = None) -> int:
    """Measure every size and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for every size")
    arguments = parser.parse_args(argv)
    if arguments.threads < 1 or not arguments.seconds > 0:
        parser.error("--threads takes a number of at least 1, --seconds one above 0")
    if onednn_obstacle():
        parser.error(onednn_obstacle())
    torch.set_num_threads(arguments.threads)
    print(f"{device_name(torch.device('cpu'))}, {arguments.threads} threads, PyTorch {torch.__version__}\n")
    print("| layer | C_in, C_out | F.linear | oneDNN | oneDNN is |")
    print("|---|---|---:|---:|---:|")
    for model, (batch, tokens, layers) in MODELS.items():
        for width_in, width_out in layers:
            torch_time, onednn_time = measure(
                (F.linear, linear), batch, tokens, width_in, width_out, arguments.seconds
            )
            # One product in the forward pass and two in the backward pass.
            rates = [6e-9 * batch * tokens * width_in * width_out / x for x in (torch_time, onednn_time)]
            cells = [
                f"{t * 1e3:.2f} ms, {r:.0f} GFLOP/s" for t, r in zip((torch_time, onednn_time), rates, strict=True)
            ]
            print(f"| {model} | {width_in}, {width_out} | {' | '.join(cells)} | {torch_time / onednn_time:.2f}x |")
    print(f"\n--linear auto takes {resolve_linear()} here.")
    return 0


def measure(
    functions: tuple[_Linear, ...], batch: int, tokens: int, width_in: int, width_out: int, seconds: float
) -> list[float]:
    """Median seconds of forward and backward by each function, at least five times each."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, gradient = (
        torch.randn(shape, generator=generator)
        for shape in ((batch, tokens, width_in), (width_out, width_in), (width_out,), (batch, tokens, width_out))
    )
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    times: list[list[float]] = [[] for _ in functions]
    started = time.perf_counter()
    while len(times[0]) < 6 or time.perf_counter() - started < seconds:
        for function, taken in zip(functions, times, strict=True):
            begin = time.perf_counter()
            torch.autograd.grad(function(*leaves), leaves, gradient)
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for taken in times]  # the first one prepares


if __name__ == "__main__":
    raise SystemExit(main())
