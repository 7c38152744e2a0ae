"""Modules: the prefix plugins, the drop-in for timm's Attention, and its application to a whole ViT."""

from fedperfix_kernels.nn.activation import NativeGELU, set_activations
from fedperfix_kernels.nn.apply import apply_prefix, prefix_parameters
from fedperfix_kernels.nn.attention import PrefixAttention, set_backend
from fedperfix_kernels.nn.linear import ChosenLinear, set_linear
from fedperfix_kernels.nn.prefixes import INITS, PREFIXES, Prefix
from fedperfix_kernels.nn.window import PrefixWindowAttention

__all__ = [
    "INITS",
    "PREFIXES",
    "ChosenLinear",
    "NativeGELU",
    "Prefix",
    "PrefixAttention",
    "PrefixWindowAttention",
    "apply_prefix",
    "prefix_parameters",
    "set_activations",
    "set_backend",
    "set_linear",
]
