"""Every variant of the attention kernels that a user can reach, described for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from fedperfix_kernels.aot import Variant, describe
from fedperfix_kernels.attention.api import MODES
from fedperfix_kernels.attention.configs import (
    BACKWARD_BIAS,
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    BACKWARD_WHOLE,
    BUCKETS,
    FORWARD,
    HALF,
    IEEE,
    TF32,
    WITH_OPTIONS,
    LaunchConfig,
    launch_config,
    padded_head_dim,
    row_blocks,
)
from fedperfix_kernels.attention.kernels.forward import attention_forward
from fedperfix_kernels.attention.kernels.split_backward import (
    attention_backward_bias,
    attention_backward_keys,
    attention_backward_queries,
)
from fedperfix_kernels.attention.kernels.whole_backward import attention_backward_whole

HEAD_DIMS = (16, 32, 64, 80, 128)  # every padded width, and one head width that is not a power of two
_ELEMENT_TYPES = (("bf16", HALF), ("fp16", HALF), ("fp32", IEEE), ("fp32", TF32))
# Statistics and sums are float32 whatever the storage type.
_POINTERS = {
    **dict.fromkeys(("gate_ptr", "lse_ptr", "delta_ptr", "dgate_ptr", "partial_ptr", "dbias_ptr"), "*fp32"),
    **dict.fromkeys(("prefix_index_ptr", "order_ptr", "bounds_ptr"), "*i64"),
    "key_mask_ptr": "*i1",
}
_PLAIN = {"BIAS": False, "MASK": False, "INDEXED": False}
_FULL = {"BIAS": True, "MASK": True, "INDEXED": True}
# Sizes that reach every way of walking rows: a loop, with a tail of 16 where the configuration has tails (197 and
# 257 tokens end so as well), and one single block.
_MANY, _FEW = 577, 10
_ANY = 1 << 20  # more tokens than any bucket holds


def variants(arch: str = "base") -> Iterator[Variant]:
    """Yield every (kernel, mode or branch, element type, head width), as configured for one architecture."""
    for element, kind in _ELEMENT_TYPES:
        if arch.startswith("gfx") and kind == TF32:  # AMD GPUs compute in full float32
            continue
        for head_dim in HEAD_DIMS:
            make = _Maker(element, kind, head_dim, arch)
            for mode in MODES:
                yield make.queries_side(FORWARD, attention_forward, mode, _PLAIN)
                yield make.queries_side(BACKWARD_QUERIES, attention_backward_queries, mode, _PLAIN)
            for mode in ("gated", "concat"):
                yield make.queries_side(FORWARD, attention_forward, mode, _PLAIN, _FEW)
                yield make.queries_side(BACKWARD_QUERIES, attention_backward_queries, mode, _PLAIN, _FEW)
            for branch in ("base", "gated", "concat", "additive"):
                yield make.keys(branch, _PLAIN)
            yield from make.whole()
            for size in make.own_buckets(FORWARD):
                for mode in MODES:
                    yield make.queries_side(FORWARD, attention_forward, mode, _PLAIN, longest=size)
            for size in make.own_buckets(BACKWARD_QUERIES):
                for mode in MODES:
                    yield make.queries_side(
                        BACKWARD_QUERIES, attention_backward_queries, mode, _PLAIN, longest=size
                    )
            for size in make.own_buckets(BACKWARD_KEYS):
                for branch in ("base", "gated", "concat", "additive"):
                    yield make.keys(branch, _PLAIN, size)
        for head_dim in (32, 64, 128):  # bias, key mask and table together, at Swin's head width and wider ones
            make = _Maker(element, kind, head_dim, arch)
            yield make.queries_side(FORWARD, attention_forward, "gated", _FULL)
            yield make.queries_side(BACKWARD_QUERIES, attention_backward_queries, "gated", _FULL)
            yield make.keys("base", _FULL | {"INDEXED": False})
            yield make.keys("gated", _PLAIN | {"INDEXED": True})
            yield make.bias()


class _Maker:
    """Describes the variants of one element type and head width."""

    def __init__(self, element: str, kind: str, head_dim: int, arch: str) -> None:
        self.element = element
        self.kind = kind
        self.head_dim = head_dim
        self.arch = arch

    def config(self, kernel: str, longest: int = _ANY) -> LaunchConfig | None:
        return launch_config(kernel, self.kind, self.head_dim, longest, self.arch)

    def own_buckets(self, kernel: str) -> list[int]:
        """The largest bucket of each configuration other than that of any number of tokens."""
        largest = {self.config(kernel, size): size for size in BUCKETS}
        largest.pop(self.config(kernel), None)
        return list(largest.values())

    def queries_side(
        self,
        kernel: str,
        function: object,
        mode: str,
        flags: dict[str, bool],
        prefix_len: int = _MANY,
        longest: int = _ANY,
    ) -> Variant:
        config = self.config(kernel + _suffix(flags), longest)
        loop, tail = row_blocks(_MANY, config.block_n, config.tails)
        prefix_loop, prefix_tail = row_blocks(prefix_len, config.block_n, config.tails)
        walks = {"LOOP": loop, "TAIL": tail, "PREFIX_LOOP": prefix_loop, "PREFIX_TAIL": prefix_tail}
        few = f", {prefix_len} prefix keys" if prefix_len == _FEW else ""
        case = f"{mode}{_features(flags)}{few}{_bucket(longest)}"
        return self._variant(
            kernel, function, case, flags | walks | {"MODE": mode, "BLOCK_N": config.block_n}, config
        )

    def keys(self, branch: str, flags: dict[str, bool], longest: int = _ANY) -> Variant:
        config = self.config(BACKWARD_KEYS + _suffix(flags), longest)
        loop, tail = row_blocks(_MANY, config.block_m, config.tails)
        constants = flags | {"BRANCH": branch, "LOOP": loop, "TAIL": tail, "BLOCK_N": config.block_n}
        case = branch if branch in ("base", "additive") else f"{branch} prefix"
        case += _features(flags) + _bucket(longest)
        return self._variant(BACKWARD_KEYS, attention_backward_keys, case, constants, config)

    def bias(self) -> Variant:
        config = self.config(BACKWARD_BIAS)
        constants = {"ADD": False, "MASK": True, "INDEXED": True, "BLOCK_N": config.block_n}
        return self._variant(BACKWARD_BIAS, attention_backward_bias, "gated", constants, config)

    def whole(self) -> Iterator[Variant]:
        for size in BUCKETS:
            config = self.config(BACKWARD_WHOLE, size)
            for mode in MODES if config else ():
                prefix_block = 0 if mode == "additive" else size
                loop, tail = row_blocks(size - 15, config.block_m, config.tails)
                constants = {"MODE": mode, "BLOCK_N": size, "BLOCK_L": prefix_block, "LOOP": loop, "TAIL": tail}
                case = f"{mode}, up to {size} keys"
                yield self._variant(BACKWARD_WHOLE, attention_backward_whole, case, constants, config)

    def _variant(self, kernel: str, function: object, case: str, constants: dict, config: LaunchConfig) -> Variant:
        constants = constants | {
            "D": self.head_dim,
            "BLOCK_M": config.block_m,
            "BLOCK_D": padded_head_dim(self.head_dim),
            "PRECISION": "tf32" if self.kind == TF32 else "ieee",
            "ACC": tl.float32,
        }
        element = "tf32" if self.kind == TF32 else self.element
        return describe(
            name=f"attention {kernel}, {case}, {element}, D={self.head_dim}",
            function=function,
            constants=constants,
            pointer_types=lambda argument: _POINTERS.get(argument, f"*{self.element}"),
            integer_types={"scale": "fp32"},
            unaligned=(
                "heads", "tokens", "prefix_len", "length", "batch", "batch_per_program", "bias_groups", "images",
                "images_per_program", "bias_stride_b", "bias_stride_h", "gate_stride_b",
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip


def _suffix(flags: dict[str, bool]) -> str:
    return WITH_OPTIONS if flags["BIAS"] or flags["MASK"] else ""


def _bucket(longest: int) -> str:
    return "" if longest == _ANY else f", up to {longest} tokens"


def _features(flags: dict[str, bool]) -> str:
    names = {"BIAS": "bias", "MASK": "key mask", "INDEXED": "table"}
    present = [names[flag] for flag, on in flags.items() if on]
    return f" with {', '.join(present)}" if present else ""
