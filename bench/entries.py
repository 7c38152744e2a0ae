"""What a record's entry says: whose time, by which clock, how many times faster. Pure functions on JSON values."""

from __future__ import annotations

from typing import Any

Entry = dict[str, Any]
Variant = dict[str, Any]

_OURS = ("fused", "fedperfix", "SDPA")  # SDPA is what the library runs where it has no kernels


def is_sound(variant: Variant) -> bool:
    """Whether the variant passed its check and was timed."""
    return "failed" not in variant and "unavailable" not in variant


def ours(entry: Entry) -> str:
    """The variant of an entry that this library runs on the entry's device.

    Raises:
        ValueError: the entry has none.
    """
    for name in _OURS:
        if name in entry["variants"]:
            return name
    raise ValueError(f"entry: got {entry['name']!r} without {', '.join(_OURS)}, takes one of them")


def seconds(variant: Variant) -> dict[str, float]:
    """The spread of the variant's device time where there is one, else of its wall time."""
    return variant.get("device_seconds", variant.get("wall_seconds"))


def speed(variant: Variant, other: Variant) -> float:
    """How many times faster `variant` is than `other`, by the device's clock if it timed both, else the wall's."""
    clock = "device_seconds" if "device_seconds" in variant and "device_seconds" in other else "wall_seconds"
    return other[clock]["median"] / variant[clock]["median"]
