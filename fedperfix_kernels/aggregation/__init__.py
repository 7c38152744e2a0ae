"""Aggregation: the weighted mean of many clients' parameters, layer by layer."""

from fedperfix_kernels.aggregation.api import aggregate

__all__ = ["aggregate"]
