"""What is there and what runs: `python -m fedperfix_kernels.doctor` prints what a bug report starts with."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence

import torch

from fedperfix_kernels import backends, native
from fedperfix_kernels.native import library


def report() -> Iterator[tuple[str, str]]:
    """Lines (name, text): versions, GPU, Triton, native kernels, and which implementation a call runs."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", torch.__version__
    yield "triton", _version("triton")
    yield "processor", f"{platform.machine()}, PyTorch uses {torch.backends.cpu.get_cpu_capability()}"
    yield from _native()
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        yield f"GPU {device.index}", f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    if len(devices) == 1:
        yield "GPU", "none that PyTorch sees"
    for device in devices:
        yield f"kernels on {device}", backends.explain("auto", device)


def _native() -> Iterator[tuple[str, str]]:
    if native.obstacle():
        yield "native kernels", f"none: {native.obstacle()}"
        yield "", "on a CPU attention and aggregation then run as PyTorch's own operations"
        return
    yield "native kernels", str(library.path())
    yield "instruction sets", ", ".join(f"{name} ({state})" for name, state in native.instruction_sets().items())
    yield "in use", f"{native.instruction_set()} ({library.VARIABLE} chooses another one)"
    threads = f"{library.threads()}, of {library.runtime() or 'no OpenMP runtime: calls run on one thread'}"
    yield "threads", threads


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report."""
    argparse.ArgumentParser(prog="python -m fedperfix_kernels.doctor", description=__doc__).parse_args(arguments)
    for name, text in report():
        print(f"{name:<18}{text}")


if __name__ == "__main__":
    main()
