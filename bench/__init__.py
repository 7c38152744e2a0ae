"""Benchmarks: every claim about speed and memory, with the reference beside it in the same run."""
