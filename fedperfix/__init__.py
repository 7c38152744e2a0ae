"""Personalised federated learning of Vision Transformers on fused kernels."""

from fedperfix_kernels import (
    ParameterArena,
    PrefixAttention,
    aggregate,
    apply_prefix,
    prefix_attention,
)

__version__ = "0.1.0"
__all__ = ["ParameterArena", "PrefixAttention", "__version__", "aggregate", "apply_prefix", "prefix_attention"]
