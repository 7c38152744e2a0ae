"""Every variant of the aggregation kernels that a user can reach, described for ahead-of-time compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import triton.language as tl

from fedperfix_kernels.aggregation import triton_kernels as kernels
from fedperfix_kernels.aggregation.configs import BLOCK, GRAMS, NETWORKS, NUM_WARPS, SORTS, SPAN, UNROLL
from fedperfix_kernels.aggregation.network import comparators
from fedperfix_kernels.aot import Variant, describe

_POINTERS = {
    "address_ptr": "*i64",
    "shares_ptr": "*fp32",
    "scales_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "block_tensor_ptr": "*i32",
    "block_start_ptr": "*i64",
    "numel_ptr": "*i64",
    "out_address_ptr": "*i64",
    "block_layer_ptr": "*i32",
    "nonfinite_ptr": "*i1",
    "values_ptr": "*i8",
}
_ELEMENTS = ("bf16", "fp16", "fp32")
_UNALIGNED = ("clients", "numel", "blocks", "layers", "tensors", "trim", "seed")


def variants() -> Iterator[Variant]:
    """Yield every kernel with every case and element type."""
    for element in _ELEMENTS:
        yield from _means(element)
        yield from _rules(element)


def _means(element: str) -> Iterator[Variant]:
    shared = {"BLOCK": BLOCK, "UNROLL": UNROLL, "ACC": tl.float32}
    flags = (False, True)
    for per_layer, scaled, nonfinite in itertools.product(flags, repeat=3):
        case = f"per {'layer' if per_layer else 'client'}{', int8' * scaled}{', checked' * nonfinite}"
        constants = shared | {"PER_LAYER": per_layer, "SCALED": scaled, "NONFINITE": nonfinite}
        pointers = {"uploads_ptr": "*i8"} if scaled else {}
        yield _variant(f"aggregation rows, {case}, {element}", kernels.aggregate_rows, constants, element, pointers)
    for aligned, nonfinite in itertools.product(flags, repeat=2):
        case = f"{'' if aligned else 'un'}aligned{', checked' * nonfinite}"
        constants = shared | {"ALIGNED": aligned, "NONFINITE": nonfinite}
        yield _variant(f"aggregation tables, {case}, {element}", kernels.aggregate_tables, constants, element)


def _rules(element: str) -> Iterator[Variant]:
    for tile in (*NETWORKS, *SORTS):
        constants = {"CLIENTS": tile.clients, "BLOCK": tile.block}
        function = kernels.trimmed_mean_sort
        if tile in NETWORKS:
            function = kernels.trimmed_mean_network
            constants["PAIRS"] = comparators(tile.clients)
        name = f"aggregation trimmed mean, K<={tile.clients}, {element}"
        yield _variant(name, function, constants, element, num_warps=tile.num_warps)
    for tile in GRAMS:
        constants = {"CLIENTS": tile.clients, "BLOCK": tile.block, "SPAN": SPAN}
        name = f"aggregation Gram matrix, K<={tile.clients}, {element}"
        yield _variant(name, kernels.gram, constants, element, num_warps=tile.num_warps, num_stages=1)
    name = f"aggregation squared norms, {element}"
    yield _variant(name, kernels.squared_norms, {"BLOCK": BLOCK, "SPAN": SPAN}, element)
    for noise in (False, True):
        name = f"aggregation {'noisy' if noise else 'shifted'} mean, {element}"
        constants = {"BLOCK": BLOCK, "UNROLL": UNROLL, "NOISE": noise}
        yield _variant(name, kernels.shifted_mean, constants, element)
    yield _variant(f"aggregation quantisation, {element}", kernels.quantize, {"BLOCK": BLOCK}, element)


def _variant(
    name: str,
    function: object,
    constants: Mapping[str, object],
    element: str,
    pointers: Mapping[str, str] | None = None,
    num_warps: int = NUM_WARPS,
    num_stages: int = 3,
) -> Variant:
    types = _POINTERS | dict(pointers or {})
    return describe(
        name=name,
        function=function,
        constants=constants,
        pointer_types=lambda argument: types.get(argument, f"*{element}"),
        integer_types={"std": "fp32", "seed": "i64"},
        unaligned=_UNALIGNED,
        num_warps=num_warps,
        num_stages=num_stages,
    )
