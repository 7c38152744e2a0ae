"""Fused kernels for personalised federated learning of Vision Transformers: prefix attention and aggregation."""

from fedperfix_kernels.aggregation import aggregate
from fedperfix_kernels.arena import BlockLayout, ParameterArena
from fedperfix_kernels.attention import MODES, packed_prefix_attention, prefix_attention
from fedperfix_kernels.backends import BACKENDS, explain
from fedperfix_kernels.nn import PrefixAttention, apply_prefix, prefix_parameters, set_backend

__all__ = [
    "BACKENDS",
    "MODES",
    "BlockLayout",
    "ParameterArena",
    "PrefixAttention",
    "aggregate",
    "apply_prefix",
    "explain",
    "packed_prefix_attention",
    "prefix_attention",
    "prefix_parameters",
    "set_backend",
]
