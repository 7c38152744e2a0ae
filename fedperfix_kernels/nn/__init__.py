"""Modules: the prefix plugins, the drop-in for timm's Attention, and its application to a whole ViT."""

from fedperfix_kernels.nn.apply import apply_prefix, prefix_parameters
from fedperfix_kernels.nn.attention import PrefixAttention, set_backend
from fedperfix_kernels.nn.prefixes import INITS, PREFIXES, Prefix

__all__ = [
    "INITS",
    "PREFIXES",
    "Prefix",
    "PrefixAttention",
    "apply_prefix",
    "prefix_parameters",
    "set_backend",
]
