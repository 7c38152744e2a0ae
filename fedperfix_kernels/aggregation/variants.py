"""Every variant of the aggregation kernels that a user can reach, described for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from fedperfix_kernels.aggregation import triton_kernels as kernels
from fedperfix_kernels.aggregation.configs import BLOCK, NUM_WARPS, UNROLL
from fedperfix_kernels.aot import Variant, describe

_TABLE_POINTERS = {
    "address_ptr": "*i64",
    "shares_ptr": "*fp32",
    "block_tensor_ptr": "*i32",
    "block_start_ptr": "*i64",
    "numel_ptr": "*i64",
    "out_address_ptr": "*i64",
    "block_layer_ptr": "*i32",
}


def variants() -> Iterator[Variant]:
    """Yield every (kernel, per layer or not, aligned or not, element type)."""
    shared = {"BLOCK": BLOCK, "UNROLL": UNROLL, "ACC": tl.float32}
    for element in ("bf16", "fp16", "fp32"):
        for case, flag in (("per client", False), ("per layer", True)):
            name = f"aggregation rows, {case}, {element}"
            yield _variant(name, kernels.aggregate_rows, shared | {"PER_LAYER": flag}, element)
        for case, flag in (("aligned", True), ("unaligned", False)):
            name = f"aggregation tables, {case}, {element}"
            yield _variant(name, kernels.aggregate_tables, shared | {"ALIGNED": flag}, element)


def _variant(name: str, function: object, constants: dict[str, object], element: str) -> Variant:
    return describe(
        name=name,
        function=function,
        constants=constants,
        pointer_types=lambda argument: _TABLE_POINTERS.get(argument, f"*{element}"),
        unaligned=("clients", "numel", "layers", "tensors"),
        num_warps=NUM_WARPS,
        num_stages=3,
    )
