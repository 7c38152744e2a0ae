"""Turn records into tables: `python -m bench.report` rewrites the README's figures from bench/results/*.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def comparison_table(entry: dict[str, Any]) -> str:
    """One comparison of a record as a Markdown table, all ratios to its first variant."""
    lines = [
        f"**{entry['name']}**",
        "",
        "| variant | time (range) | ratio | rate | peak memory | of the limit |",
        "|---|---|---|---|---|---|",
    ]
    baseline = next(iter(entry["variants"].values()))
    for name, variant in entry["variants"].items():
        if "failed" in variant:
            lines.append(f"| {name} | no speed: {variant['failed']} | | | | |")
            continue
        spread = seconds(variant)
        ratio = f"{seconds(baseline)['median'] / spread['median']:.2f}x" if "failed" not in baseline else "–"
        span = f"{_time(spread['median'])} ({_time(spread['lowest'])} – {_time(spread['highest'])})"
        limit = variant.get("fraction_of_limit")
        rate = rate_text(entry["unit"], variant[f"{entry['unit']}_per_second"])
        memory = f"{variant['peak_bytes'] / 1e6:.1f} MB"
        share = "–" if limit is None else f"{limit:.0%}"
        lines.append(f"| {name} | {span} | {ratio} | {rate} | {memory} | {share} |")
    return "\n".join(lines) + "\n"


def seconds(variant: dict[str, Any]) -> dict[str, float]:
    """The variant's device time where there is one, else its wall time."""
    return variant.get("device_seconds", variant.get("wall_seconds"))


def figures(records: list[dict[str, Any]]) -> str:
    """The README's section: per device its ceilings, then one line per comparison, ours against the baseline."""
    parts = []
    for record in records:
        limits = record["ceilings"]
        versions = record["versions"]
        parts.append(
            f"### {record['device']}\n\n"
            f"{record['date']}, commit {record['commit']}, "
            f"PyTorch {versions['torch']}, Triton {versions['triton']}; "
            f"measured ceilings: copy {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, matrix products "
            f"{limits['matrix_float32'] / 1e12:.1f} TFLOP/s (float32) and "
            f"{limits['matrix_bfloat16'] / 1e12:.1f} TFLOP/s (bfloat16).\n\n{_summary(record)}"
        )
    return "\n".join(parts)


def _summary(record: dict[str, Any]) -> str:
    lines = [
        "| work | baseline | ours | speed | best other | memory | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in record["comparisons"]:
        if entry["settings"].get("backward") is False:  # in docs/benchmarks.md; training needs both directions
            continue
        sound = {name: v for name, v in entry["variants"].items() if "failed" not in v}
        names = list(entry["variants"])
        ours = names[-1] if names[-1] in ("fused", "fedperfix") else "SDPA"
        if ours not in sound or names[0] not in sound:
            continue
        others = {n: seconds(v)["median"] for n, v in sound.items() if n not in (ours, names[0])}
        best = min(others, key=others.get) if others else None
        base, own = sound[names[0]], sound[ours]
        mine = seconds(own)["median"]
        limit = own.get("fraction_of_limit")
        rival = "–" if best is None else f"{others[best] / mine:.2f}x of {best}"
        lines.append(
            f"| {entry['name']} | {names[0]}, {_time(seconds(base)['median'])} | {ours}, {_time(mine)} | "
            f"**{seconds(base)['median'] / mine:.2f}x** | {rival} | "
            f"{own['peak_bytes'] / max(1, base['peak_bytes']):.2f}x | {'–' if limit is None else f'{limit:.0%}'} |"
        )
    return "\n".join(lines) + "\n"


def rate_text(unit: str, rate: float) -> str:
    """A rate for people: GB/s of bytes, or images/s."""
    return f"{rate / 1e9:.1f} GB/s" if unit == "bytes" else f"{rate:,.0f} images/s"


def _time(value: float) -> str:
    return f"{value * 1e6:.0f} µs" if value < 1e-3 else f"{value * 1e3:.2f} ms"


def updated(readme: str, records: list[dict[str, Any]]) -> str:
    """The README's text with the section between the two markers replaced."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{figures(records)}\n{END}{tail}"


def load_records() -> list[dict[str, Any]]:
    """Every committed record, GPUs first."""
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob("*.json"))]
    return sorted(records, key=lambda record: record["threads"] is not None)


def main() -> int:
    """Rewrite README.md's figures and docs/benchmarks.md's tables."""
    records = load_records()
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(), records))
    tables = [
        f"## {record['device']}\n\n" + "\n".join(comparison_table(entry) for entry in record["comparisons"])
        for record in records
    ]
    text = "# Benchmarks\n\nMade by `python -m bench.report` from `bench/results/`.\n\n" + "\n".join(tables)
    (ROOT / "docs" / "benchmarks.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
