"""Fused kernels for personalised federated learning of Vision Transformers: prefix attention and aggregation."""

from fedperfix_kernels.aggregation import (
    Quantized,
    aggregate,
    clipped_mean,
    krum,
    median,
    noisy_mean,
    quantize,
    trimmed_mean,
)
from fedperfix_kernels.arena import BlockLayout, ParameterArena
from fedperfix_kernels.attention import MODES, packed_prefix_attention, prefix_attention
from fedperfix_kernels.backends import BACKENDS, explain
from fedperfix_kernels.nn import (
    PrefixAttention,
    PrefixWindowAttention,
    apply_prefix,
    prefix_parameters,
    set_activations,
    set_backend,
    set_linear,
)

__all__ = [
    "BACKENDS",
    "MODES",
    "BlockLayout",
    "ParameterArena",
    "PrefixAttention",
    "PrefixWindowAttention",
    "Quantized",
    "aggregate",
    "apply_prefix",
    "clipped_mean",
    "explain",
    "krum",
    "median",
    "noisy_mean",
    "packed_prefix_attention",
    "prefix_attention",
    "prefix_parameters",
    "quantize",
    "set_activations",
    "set_backend",
    "set_linear",
    "trimmed_mean",
]
