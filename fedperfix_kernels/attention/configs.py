"""Launch configurations of the attention kernels: a small table, no tuning at a user's first call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is cut into programs.

    Args:
        block_m: queries per block.
        block_n: keys per block.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS = "forward", "backward_queries", "backward_keys"

# Kinds of products. `half`: float16 and bfloat16 on tensor cores; `tf32`: float32 on tensor cores; `ieee`: full
# float32 on the ordinary units.
HALF, TF32, IEEE = "half", "tf32", "ieee"

# By kind, kernel and padded head width. Each entry compiles without spills for sm_80, sm_90 and sm_100 and stays
# below the 99 KiB of shared memory of sm_86 and sm_89 (docs/kernel-resources.md has every figure).
_TABLE: dict[str, dict[str, dict[int, LaunchConfig]]] = {
    HALF: {
        FORWARD: {
            16: LaunchConfig(64, 64, 4, 1),
            32: LaunchConfig(64, 64, 4, 2),
            64: LaunchConfig(64, 64, 4, 2),
            128: LaunchConfig(64, 32, 8, 2),
        },
        BACKWARD_QUERIES: {
            16: LaunchConfig(64, 64, 4, 2),
            32: LaunchConfig(64, 64, 4, 2),
            64: LaunchConfig(64, 64, 4, 1),
            128: LaunchConfig(64, 32, 8, 2),
        },
        BACKWARD_KEYS: {
            16: LaunchConfig(64, 64, 4, 2),
            32: LaunchConfig(64, 64, 4, 2),
            64: LaunchConfig(32, 64, 4, 2),
            128: LaunchConfig(64, 64, 8, 1),
        },
    },
    TF32: {
        FORWARD: {
            16: LaunchConfig(64, 32, 4, 2),
            32: LaunchConfig(64, 32, 4, 2),
            64: LaunchConfig(64, 32, 4, 1),
            128: LaunchConfig(64, 32, 8, 1),
        },
        BACKWARD_QUERIES: {
            16: LaunchConfig(64, 32, 4, 2),
            32: LaunchConfig(64, 32, 4, 1),
            64: LaunchConfig(64, 32, 8, 1),
            128: LaunchConfig(32, 16, 8, 1),
        },
        BACKWARD_KEYS: {
            16: LaunchConfig(64, 64, 8, 1),
            32: LaunchConfig(64, 64, 8, 1),
            64: LaunchConfig(32, 64, 8, 1),
            128: LaunchConfig(16, 16, 4, 1),
        },
    },
    IEEE: {
        FORWARD: {
            16: LaunchConfig(32, 32, 4, 1),
            32: LaunchConfig(32, 32, 4, 1),
            64: LaunchConfig(32, 32, 4, 1),
            128: LaunchConfig(32, 16, 8, 1),
        },
        BACKWARD_QUERIES: {
            16: LaunchConfig(32, 32, 4, 1),
            32: LaunchConfig(16, 16, 4, 1),
            64: LaunchConfig(32, 32, 8, 1),
            128: LaunchConfig(16, 16, 8, 1),
        },
        BACKWARD_KEYS: {
            16: LaunchConfig(16, 32, 4, 1),
            32: LaunchConfig(16, 16, 4, 1),
            64: LaunchConfig(16, 16, 2, 1),
            128: LaunchConfig(32, 16, 8, 1),
        },
    },
}

# AMD's CDNA3 has other limits: where the entry above spills on gfx942, this one does not.
_AMD_TABLE: dict[tuple[str, str, int], LaunchConfig] = {
    (HALF, BACKWARD_QUERIES, 128): LaunchConfig(32, 32, 4, 1),
    (HALF, BACKWARD_KEYS, 128): LaunchConfig(32, 32, 4, 1),
    (IEEE, BACKWARD_KEYS, 128): LaunchConfig(16, 32, 8, 1),
}

MAX_HEAD_DIM = 128


def padded_head_dim(head_dim: int) -> int:
    """Width of the blocks that hold a head: the next power of two, at least 16 (the smallest product)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def launch_config(kernel: str, kind: str, head_dim: int, amd: bool = False) -> LaunchConfig:
    """The configuration of `kernel` for one kind of products and heads of width `head_dim`."""
    padded = padded_head_dim(head_dim)
    entry = _TABLE[kind][kernel][padded]
    return _AMD_TABLE.get((kind, kernel, padded), entry) if amd else entry
