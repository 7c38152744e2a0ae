"""Launch configurations of the attention kernels: a small table, no tuning at a user's first call.

`configs.json` holds it: `base` for every architecture, and one section per architecture with what differs there, by
kind of products, kernel, padded head width and bucket of tokens. `python -m fedperfix_kernels.tune` measures the
candidates on the GPU at hand and writes that GPU's section.
"""

from __future__ import annotations

import functools
import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS = "forward", "backward_queries", "backward_keys"
# The one-kernel backward pass; where it has no entry, the queries' and keys' kernels run.
BACKWARD_WHOLE = "backward_whole"
# The kernels with a bias or a key mask need more registers, so they have configurations of their own.
WITH_OPTIONS = "_with_options"
BACKWARD_BIAS = "backward_bias"
KERNELS = (
    FORWARD,
    BACKWARD_QUERIES,
    BACKWARD_KEYS,
    BACKWARD_WHOLE,
    FORWARD + WITH_OPTIONS,
    BACKWARD_QUERIES + WITH_OPTIONS,
    BACKWARD_KEYS + WITH_OPTIONS,
    BACKWARD_BIAS,
)

# Kinds of products. `half`: float16 and bfloat16 on tensor cores; `tf32`: float32 on tensor cores; `ieee`: full
# float32 on the ordinary units.
HALF, TF32, IEEE = "half", "tf32", "ieee"

# Entries hold for up to so many tokens (or prefix keys, whichever are more); `*` holds for any number.
BUCKETS = (64, 128, 256, 512)
MAX_HEAD_DIM = 128
TABLE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is cut into programs.

    Args:
        block_m: queries per block.
        block_n: keys per block; 0 where a program holds all keys.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        tails: whether a smaller last block holds the rest of the rows that the kernel loops over, instead of a
            checked block of full size. It computes less on padding and needs more registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tails: bool = False


def launch_config(kernel: str, kind: str, head_dim: int, longest: int, arch: str) -> LaunchConfig | None:
    """The configuration of one launch.

    Args:
        kernel: one of `KERNELS`.
        kind: of products, `half`, `tf32` or `ieee`.
        head_dim: D.
        longest: the larger of tokens N and prefix keys L.
        arch: as `architecture` names it; one that the table does not know is served by `base`.

    Returns:
        The entry of the smallest bucket that holds `longest`; None for `backward_whole` where it is not used.
    """
    return _lookup(kernel, kind, padded_head_dim(head_dim), _bucket(longest), arch)


@functools.lru_cache(maxsize=1024)
def _lookup(kernel: str, kind: str, width: int, bucket: str, arch: str) -> LaunchConfig | None:
    names = [str(size) for size in BUCKETS if bucket != "*" and size >= int(bucket)] + ["*"]
    for section in (arch, "base"):
        entries = table().get(section, {}).get(kind, {}).get(kernel, {}).get(str(width), {})
        for name in names:
            if name in entries:
                return from_entry(entries[name])
    return None


def _bucket(longest: int) -> str:
    return next((str(size) for size in BUCKETS if longest <= size), "*")


@functools.lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """section → kind → kernel → padded head width → bucket → [M, N, warps, stages, tails]; [] is none."""
    return json.loads(TABLE.read_text())


def formatted(content: dict[str, Any]) -> str:
    """The table as it is written to `configs.json`: one line per head width."""
    lines = json.dumps(content, indent=1).splitlines()
    text, depth, joined = [], 0, ""
    for line in lines:
        depth += line.count("{") + line.count("[")
        stripped = line.strip()
        if depth > 4 or joined:
            joined += (" " if joined and joined[-1] in ",:" else "") + stripped
        else:
            text.append(line)
        depth -= line.count("}") + line.count("]")
        if joined and depth <= 4:
            text.append(" " * 4 + joined)
            joined = ""
    return "\n".join(text) + "\n"


def entry(config: LaunchConfig | None) -> list[int]:
    """A configuration as the table holds it."""
    return [] if config is None else [int(value) for value in astuple(config)]


def from_entry(values: list[int]) -> LaunchConfig | None:
    """The inverse of `entry`."""
    return LaunchConfig(*values[:4], tails=bool(values[4])) if values else None


def architecture(device: torch.device) -> str:
    """`sm_90`, `gfx942` and the like; `base` for tensors that are on no GPU (the interpreter)."""
    return _architecture(device) if device.type == "cuda" else "base"


@functools.lru_cache(maxsize=16)
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def padded_head_dim(head_dim: int) -> int:
    """Width of the blocks that hold a head: the next power of two, at least 16 (the smallest product)."""
    return key_block(head_dim)


def key_block(length: int) -> int:
    """Smallest block that holds `length` rows: a power of two, at least 16."""
    return max(16, 1 << (length - 1).bit_length())


def row_blocks(length: int, block: int, tails: bool) -> tuple[int, int]:
    """(LOOP, TAIL): how `length` rows are walked in blocks of `block` rows (see `kernels/blocks.py`)."""
    if length == 0:
        return 0, 0
    if length % block == 0:
        return 1, 0
    if not tails:
        return 2, 0
    return (0 if length < block else 1), key_block(length % block)
