"""Fused kernels for personalised federated learning of Vision Transformers: prefix attention and aggregation."""

from fedperfix_kernels.aggregation import aggregate
from fedperfix_kernels.arena import BlockLayout, ParameterArena
from fedperfix_kernels.attention import MODES, packed_prefix_attention, prefix_attention
from fedperfix_kernels.backends import BACKENDS, explain

__all__ = [
    "BACKENDS",
    "MODES",
    "BlockLayout",
    "ParameterArena",
    "aggregate",
    "explain",
    "packed_prefix_attention",
    "prefix_attention",
]
