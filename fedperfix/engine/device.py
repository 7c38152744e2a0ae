"""Where a run computes and in which number format."""

from __future__ import annotations

import torch

from fedperfix.config import ConfigError
from fedperfix_kernels.linear import onednn_obstacle, resolve_linear


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` is a GPU if there is one, else Apple's, else the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
        raise ConfigError(f"--device: got '{name}', but PyTorch finds {found}; use --device cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device: got 'mps', but PyTorch cannot use it here; use --device cpu or auto")
    return device


def device_name(device: torch.device) -> str:
    """The device in words, for people."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    return str(device)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The reduced type in which forward and backward run, or None for float32.

    Args:
        precision: `fp32`, `bf16`, `fp16`, or `auto`: bf16 on a GPU or a processor that computes in it, fp32
            elsewhere.
        device: where the model is.
    """
    if precision == "auto":
        native = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": cpu_computes_in_bf16,
        }.get(device.type, lambda: False)
        precision = "bf16" if native() else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def linear_implementation(wanted: str, device: torch.device, dtype: torch.dtype | None) -> str:
    """What multiplies in linear layers, `torch` or `onednn`, as `--linear` says.

    Args:
        wanted: `torch`, `onednn`, or `auto`: what is faster on this processor, by its kind.
        device: where the model is.
        dtype: of autocast; None for float32.

    Raises:
        ConfigError: `onednn` where it is of no use, or where PyTorch lacks it.
    """
    why = onednn_obstacle()
    if device.type != "cpu":
        why = f"the device is {device}, and oneDNN is for processors"
    elif dtype is not None:
        why = f"the precision is {str(dtype).removeprefix('torch.')}, in which PyTorch takes oneDNN anyway"
    if wanted == "auto":
        return "torch" if why else resolve_linear()
    if wanted == "onednn" and why:
        raise ConfigError(f"--linear: got onednn, but {why}; use --linear auto")
    return wanted


def check_compiler(device: torch.device) -> None:
    """Refuse to compile a model for a processor where PyTorch finds no C++ compiler.

    Raises:
        ConfigError: there is none.
    """
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc  # takes a second, and `--compile` loads it anyway

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise ConfigError(
            "--compile: got True, but PyTorch finds no C++ compiler, which it needs for a CPU; install g++ "
            "(or name another in the variable CXX), or leave --compile out"
        ) from None


def cpu_computes_in_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AMX or AVX-512 BF16).

    Others emulate it, which is slower than float32.
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock reads true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
