"""Every variant of the attention kernels that a user can reach, described for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from fedperfix_kernels.aot import Variant, describe
from fedperfix_kernels.attention import triton_kernels as kernels
from fedperfix_kernels.attention.api import MODES
from fedperfix_kernels.attention.configs import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    FORWARD,
    HALF,
    IEEE,
    TF32,
    launch_config,
    padded_head_dim,
)

HEAD_DIMS = (16, 32, 64, 80, 128)  # every padded width, and one head width that is not a power of two
_ELEMENT_TYPES = (("bf16", HALF), ("fp16", HALF), ("fp32", IEEE), ("fp32", TF32))
# Statistics and sums are float32 whatever the storage type.
_FLOAT32_POINTERS = ("gate_ptr", "lse_ptr", "delta_ptr", "dgate_ptr")
_BRANCHES = {
    "base": {"ADD": False, "SCORE_GATE": False, "VALUE_GATE": False},
    "gated prefix": {"ADD": False, "SCORE_GATE": False, "VALUE_GATE": True},
    "concat prefix": {"ADD": False, "SCORE_GATE": True, "VALUE_GATE": True},
    "additive": {"ADD": True, "SCORE_GATE": False, "VALUE_GATE": False},
}


def variants(amd: bool = False) -> Iterator[Variant]:
    """Yield every (kernel, mode or branch, element type, head width), as configured for NVIDIA or AMD GPUs."""
    for element, kind in _ELEMENT_TYPES:
        if amd and kind == TF32:  # AMD GPUs compute in full float32
            continue
        for head_dim in HEAD_DIMS:
            for kernel, function in (
                (FORWARD, kernels.attention_forward),
                (BACKWARD_QUERIES, kernels.attention_backward_queries),
            ):
                for mode in MODES:
                    yield _variant(kernel, function, mode, {"MODE": mode}, element, kind, head_dim, amd)
            for branch, flags in _BRANCHES.items():
                function = kernels.attention_backward_keys
                yield _variant(BACKWARD_KEYS, function, branch, flags, element, kind, head_dim, amd)


def _variant(kernel, function, case, flags, element, kind, head_dim, amd) -> Variant:
    config = launch_config(kernel, kind, head_dim, amd)
    constants = flags | {
        "D": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": padded_head_dim(head_dim),
        "PRECISION": "tf32" if kind == TF32 else "ieee",
        "ACC": tl.float32,
    }
    return describe(
        name=f"attention {kernel}, {case}, {'tf32' if kind == TF32 else element}, D={head_dim}",
        function=function,
        constants=constants,
        pointer_types=lambda argument: "*fp32" if argument in _FLOAT32_POINTERS else f"*{element}",
        unaligned=("heads", "tokens", "prefix_len", "length", "batch", "batch_per_program"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
