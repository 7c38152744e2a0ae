"""Prefix attention: base attention with a gated, concatenated or additive prefix branch beside it."""

from fedperfix_kernels.attention.api import MODES, packed_prefix_attention, prefix_attention

__all__ = ["MODES", "packed_prefix_attention", "prefix_attention"]
