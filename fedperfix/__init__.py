"""Personalised federated learning of Vision Transformers on fused kernels.

The kernels' public names are here as well, loaded when they are first used, so that importing the package is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedperfix_kernels import (
        ParameterArena,
        PrefixAttention,
        Quantized,
        aggregate,
        apply_prefix,
        clipped_mean,
        krum,
        median,
        noisy_mean,
        prefix_attention,
        quantize,
        trimmed_mean,
    )

__version__ = "0.1.0"
__all__ = [
    "ParameterArena",
    "PrefixAttention",
    "Quantized",
    "__version__",
    "aggregate",
    "apply_prefix",
    "clipped_mean",
    "krum",
    "median",
    "noisy_mean",
    "prefix_attention",
    "quantize",
    "trimmed_mean",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        import fedperfix_kernels

        return getattr(fedperfix_kernels, name)
    raise AttributeError(f"module 'fedperfix' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
