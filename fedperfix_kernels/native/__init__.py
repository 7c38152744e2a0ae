"""Kernels of our own for processors: a library in C, built at installation where a compiler is found."""

from fedperfix_kernels.native.library import (
    INSTRUCTION_SETS,
    PORTABLE_IS_FAST,
    instruction_set,
    instruction_sets,
    obstacle,
    use_instruction_set,
)

__all__ = [
    "INSTRUCTION_SETS",
    "PORTABLE_IS_FAST",
    "instruction_set",
    "instruction_sets",
    "obstacle",
    "use_instruction_set",
]
