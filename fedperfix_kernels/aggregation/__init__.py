"""Aggregation: weighted, robust and private means of many clients' parameters."""

from fedperfix_kernels.aggregation.api import aggregate
from fedperfix_kernels.aggregation.quantized import Quantized, quantize
from fedperfix_kernels.aggregation.rules import clipped_mean, krum, median, noisy_mean, trimmed_mean

__all__ = ["Quantized", "aggregate", "clipped_mean", "krum", "median", "noisy_mean", "quantize", "trimmed_mean"]
