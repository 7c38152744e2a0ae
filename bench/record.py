"""Measure everything on this device and write one record: `python -m bench.record`.

The record is `bench/results/<device>.json`. A variant whose results fail their check in the same run gets no speed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.comparison import Comparison
from bench.comparisons import all_plans
from bench.report import comparison_table
from bench.timing import copy_bandwidth, device_times, matrix_rate, peak_memory, wall_times

RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 if every result passed its check, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.record", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--match", default="", help="only comparisons whose name contains this; writes no record")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of wall-clock timing per comparison")
    parser.add_argument(
        "--output", type=Path, help="where to write the record (default: bench/results/<device>.json)"
    )
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    started = time.perf_counter()
    record = describe_machine(device)
    if record["load"] > 0.5:
        print(f"the machine is busy (load {record['load']:.1f}): these figures will be too slow", file=sys.stderr)
    record["ceilings"] = ceilings(device)
    record["comparisons"] = []
    for plan in all_plans(device):
        if arguments.match not in plan.name:
            continue
        torch._dynamo.reset()
        entry = measure(plan.build(), device, arguments.budget, record["ceilings"])
        record["comparisons"].append(entry)
        print(comparison_table(entry), flush=True)
    record["seconds"] = round(time.perf_counter() - started, 1)
    if arguments.output or not arguments.match:
        path = arguments.output or RESULTS / f"{slug(record['device'])}.json"
        write(record, path)
        print(f"wrote {path} after {record['seconds']:.0f} s")
    failed = [(e["name"], n) for e in record["comparisons"] for n, v in e["variants"].items() if "failed" in v]
    for name, variant in failed:
        print(f"failed its check: {variant} in {name}", file=sys.stderr)
    return 1 if failed else 0


def measure(
    comparison: Comparison, device: torch.device, budget: float, limits: dict[str, float]
) -> dict[str, object]:
    """Check, time and weigh every variant of one comparison; the result goes into the record as it is."""
    wrong = comparison.wrong()
    sound = {name: variant for name, variant in comparison.variants.items() if name not in wrong}
    checked = Comparison(**{**vars(comparison), "variants": sound})
    wall = wall_times(checked, device, budget) if sound else {}
    on_device = device_times(checked, device) if sound and device.type == "cuda" and comparison.capturable else {}
    floor = _floor(comparison, limits)
    variants: dict[str, dict[str, object]] = {name: {"failed": reason} for name, reason in wrong.items()}
    for name in sound:
        best = on_device.get(name, wall[name])
        entry: dict[str, object] = {"wall_seconds": wall[name].as_dict()}
        if name in on_device:
            entry["device_seconds"] = on_device[name].as_dict()
        entry["peak_bytes"] = peak_memory(comparison.variants[name], device)
        entry[f"{comparison.unit}_per_second"] = comparison.work / best.median
        if floor:
            entry["fraction_of_limit"] = round(floor / best.median, 4)
        variants[name] = entry
    return {
        "name": comparison.name,
        "unit": comparison.unit,
        "settings": comparison.settings,
        "variants": {name: variants[name] for name in comparison.variants},
    }


def _floor(comparison: Comparison, limits: dict[str, float]) -> float:
    """Seconds of the fewest bytes or the fewest operations at the measured ceilings, whichever is longer."""
    rate = limits.get(f"matrix_{str(comparison.dtype).removeprefix('torch.')}")
    seconds = comparison.bytes_moved / limits["copy_bytes_per_second"]
    return max(seconds, comparison.flops / rate if rate else 0.0)


def ceilings(device: torch.device) -> dict[str, float]:
    """The device's measured copy bandwidth and matrix rates."""
    limits = {"copy_bytes_per_second": copy_bandwidth(device)}
    for dtype in (torch.float32, torch.bfloat16):
        limits[f"matrix_{str(dtype).removeprefix('torch.')}"] = matrix_rate(dtype, device)
    return limits


def describe_machine(device: torch.device) -> dict[str, object]:
    """Device, versions, date and commit."""
    packages = ("torch", "triton", "timm", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        model = match.group(1).strip() if match else model
    extensions = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{model}{extensions}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    """A file name for a device's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(record: dict[str, object], path: Path) -> None:
    """Write the record at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return result.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
