"""Turn records into tables and a picture: `python -m bench.report` rewrites what README and docs say of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.entries import Entry, Variant, is_sound, ours, seconds, speed
from bench.roofline import draw
from bench.targets import MISSED, NOT_MEASURED, summary, value_text

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PICTURE = "docs/images/roofline.png"
_BOTH = "forward + backward"
_OTHER_KINDS = ("forward", "backward")


def comparison_table(entry: Entry) -> str:
    """One comparison of a record as Markdown: its variants with ratios to the first, its targets, its shares."""
    lines = [
        f"**{entry['name']}**",
        "",
        "| variant | wall time (range) | device time (range) | ratio | rate | peak memory | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    baseline = next(iter(entry["variants"].values()))
    lines += [_row(name, variant, baseline, entry["unit"]) for name, variant in entry["variants"].items()]
    parts = ["\n".join(lines) + "\n", targets_table(entry), shares_table(entry)]
    return "\n".join(part for part in parts if part)


def _row(name: str, variant: Variant, baseline: Variant, unit: str) -> str:
    for trouble in ("failed", "unavailable"):
        if trouble in variant:
            return f"| {name} | no speed, {trouble}: {variant[trouble]} | | | | | |".replace("\n", " ")
    cells = [name, _span(variant.get("wall_seconds")), _span(variant.get("device_seconds"))]
    cells.append(f"{speed(variant, baseline):.2f}x" if is_sound(baseline) else "–")
    cells.append(rate_text(unit, variant[f"{unit}_per_second"]))
    cells += [memory_text(variant["peak_bytes"]), _percent(variant.get("fraction_of_limit"))]
    return f"| {' | '.join(cells)} |"


def targets_table(entry: Entry) -> str:
    """A comparison's targets with their values and results as Markdown; nothing if it has none."""
    verdicts = entry.get("targets", [])
    if not verdicts:
        return ""
    rows = [f"| {v['target']} | {value_text(v)} | {result_text(v)} |" for v in verdicts]
    return "\n".join(["| target | measured | |", "|---|---|---|", *rows]) + "\n"


def result_text(verdict: dict[str, Any]) -> str:
    """`met`, `missed` or `not measured`, and why if there is a reason."""
    return f"{verdict['result']}: {verdict['why']}" if verdict["why"] else verdict["result"]


def shares_table(entry: Entry) -> str:
    """Where a step's time goes as Markdown; nothing for a comparison that is no step."""
    found = entry.get("shares")
    if not found:
        return ""
    if "parts" not in found:
        return f"No shares of the step: {found.get('failed') or found['unavailable']}\n"
    rows = found["parts"] | {"rest": found["rest"]}
    lines = [f"| part of `{found['of']}` | time | share |", "|---|---|---|"]
    lines += [f"| {name} | {_time(value)} | {value / found['seconds']:.0%} |" for name, value in rows.items()]
    return "\n".join([*lines, f"| step | {_time(found['seconds'])} | 100% |"]) + "\n"


def figures(records: list[dict[str, Any]]) -> str:
    """The README's section: the picture; per device its ceilings, a line per comparison, and the steps' shares."""
    parts = [f"![Fraction of the limit over tokens and clients, ours and the baselines]({PICTURE})\n"]
    for record in records:
        limits = record["ceilings"]
        versions = record["versions"]
        parts.append(
            f"### {record['device']}\n\n"
            f"{record['date']}, commit {record['commit']}, "
            f"PyTorch {versions['torch']}, Triton {versions['triton']}; "
            f"measured ceilings: copy {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, matrix products "
            f"{limits['matrix_float32'] / 1e12:.1f} TFLOP/s (float32) and "
            f"{limits['matrix_bfloat16'] / 1e12:.1f} TFLOP/s (bfloat16)."
            f"{_all_targets(record)}\n\n{_summary(record)}"
        )
        parts += [_shares_line(entry) for entry in record["comparisons"] if "parts" in entry.get("shares", {})]
    return "\n".join(parts)


def _all_targets(record: dict[str, Any]) -> str:
    verdicts = [verdict for entry in record["comparisons"] for verdict in entry.get("targets", [])]
    return f" Targets: {summary(verdicts)}." if verdicts else ""


def _shares_line(entry: Entry) -> str:
    found = entry["shares"]
    rows = found["parts"] | {"rest": found["rest"]}
    texts = [f"{name} {value / found['seconds']:.0%}" for name, value in rows.items()]
    return f"Of the {entry['name']} ({found['of']}, {_time(found['seconds'])}): {', '.join(texts)}.\n"


def _summary(record: dict[str, Any]) -> str:
    lines = [
        "| work | baseline | ours | speed | best other | memory | of the limit | targets |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in record["comparisons"]:
        if entry["settings"].get("kind") in _OTHER_KINDS:  # part of the line of both
            continue
        lines.append(_summary_row(entry, _siblings(entry, record["comparisons"])))
    return "\n".join(lines) + "\n"


def _siblings(entry: Entry, entries: Iterable[Entry]) -> list[Entry]:
    """Forward and backward alone of the same case, in this order; none for work that has no kinds."""
    if entry["settings"].get("kind") != _BOTH:
        return []
    found = {e["settings"].get("kind"): e for e in entries if _case(e) == _case(entry)}
    return [found[kind] for kind in _OTHER_KINDS if kind in found]


def _case(entry: Entry) -> dict[str, Any]:
    return {key: value for key, value in entry["settings"].items() if key != "kind"}


def _summary_row(entry: Entry, siblings: list[Entry]) -> str:
    variants, own = entry["variants"], ours(entry)
    baseline = next(iter(variants))
    sound = {name: variant for name, variant in variants.items() if is_sound(variant)}
    verdicts = [verdict for e in (entry, *siblings) for verdict in e.get("targets", [])]
    targets = _targets_cell(verdicts)
    if own not in sound or baseline not in sound:
        wrong = own if own not in sound else baseline
        return f"| {entry['name']} | {baseline} | {own} | no speed: {wrong} | – | – | – | {targets} |"
    mine, base = sound[own], sound[baseline]
    rivals = {n: speed(mine, v) for n, v in sound.items() if n not in (own, baseline) and "fedperfix" not in n}
    best = min(rivals, key=rivals.__getitem__, default=None)
    limits = [e["variants"].get(own, {}).get("fraction_of_limit") for e in (*siblings, entry)]
    memory = "–" if not base["peak_bytes"] else f"{mine['peak_bytes'] / base['peak_bytes']:.2f}x"
    cells = [
        entry["name"],
        f"{baseline}, {_time(seconds(base)['median'])}",
        f"{own}, {_time(seconds(mine)['median'])}",
        f"**{speed(mine, base):.2f}x**",
        "–" if best is None else f"{rivals[best]:.2f}x of {best}",
        memory,
        " / ".join(map(_percent, limits)),
        targets,
    ]
    return f"| {' | '.join(cells)} |"


def _targets_cell(verdicts: list[dict[str, Any]]) -> str:
    """How many are met, and every other one by name."""
    if not verdicts:
        return "–"
    rest = [
        f"{v['target']} {v['result']}" + (f" ({value_text(v)})" if v["value"] is not None else "")
        for v in verdicts
        if v["result"] in (MISSED, NOT_MEASURED)
    ]
    return "; ".join([f"{len(verdicts) - len(rest)} of {len(verdicts)} met", *rest])


def rate_text(unit: str, rate: float) -> str:
    """A rate for people: GB/s of bytes, or images/s."""
    return f"{rate / 1e9:.1f} GB/s" if unit == "bytes" else f"{rate:,.0f} images/s"


def memory_text(peak_bytes: int | None) -> str:
    """Peak bytes for people; a dash for a variant that holds its memory between calls."""
    return "–" if peak_bytes is None else f"{peak_bytes / 1e6:.1f} MB"


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.0%}"


def _span(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "–"
    return f"{_time(spread['median'])} ({_time(spread['lowest'])} – {_time(spread['highest'])})"


def _time(value: float) -> str:
    return f"{value * 1e6:.0f} µs" if abs(value) < 1e-3 else f"{value * 1e3:.2f} ms"


def peers_figures(records: list[dict[str, Any]]) -> str:
    """The section of docs/peers.md: per device a line per contestant of every session."""
    return "\n".join(_peers_of(record) for record in records)


def _peers_of(record: dict[str, Any]) -> str:
    versions = record["versions"]
    lines = [
        f"### {record['device']}",
        "",
        f"{record['date']}, commit {record['commit']}, {_threads(record)}PyTorch {versions['torch']}, "
        f"Triton {versions['triton']}.",
        "",
        "| work | contestant | seconds a round (range) | CPU seconds | memory | speed against the peer | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for session in record["sessions"]:
        if "contestants" not in session:
            lines.append(f"| {session['title']} | {session.get('unavailable') or session['failed']} | | | | | |")
            continue
        lines += [_contestant(session, name) for name in session["contestants"]]
    return "\n".join(lines) + "\n"


def _threads(record: dict[str, Any]) -> str:
    return f"{record['threads']} threads, " if record["threads"] else ""


def _contestant(session: dict[str, Any], name: str) -> str:
    found, by, work = session["contestants"][name], session["ratios"].get(name), session["work"]
    spread, cpu, peak = found["seconds"], found["cpu_seconds"], found["peak_bytes"]
    met = session.get("target", {}).get("met", {}).get(name)
    cells = [
        f"{work['method']}, {work['model']}",
        f"{name} ({session['precision'].removeprefix('torch.')})" if name == "ours" else name,
        f"{spread['median']:.2f} ({spread['lowest']:.2f} – {spread['highest']:.2f})",
        f"{cpu['median']:.2f}" if cpu else "–",
        f"{peak / 2**20:,.0f} MB" if peak else "–",
        f"**{by['seconds']:.2f}x**" if by and session["same_work"] else "–",
        "–" if met is None else f"≥ {session['target']['at_least']:g}x {'met' if met else 'missed'}",
    ]
    return f"| {' | '.join(cells)} |"


def updated(text: str, section: str) -> str:
    """A text with the section between the two markers replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{section}\n{END}{tail}"


def load_records(folder: str = ".") -> list[dict[str, Any]]:
    """Every committed record of a folder in `bench/results`, GPUs first."""
    records = [
        json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results" / folder).glob("*.json"))
    ]
    return sorted(records, key=lambda record: record["threads"] is not None)


def pages() -> dict[Path, str]:
    """Every page with figures, as the records say that it should be."""
    sections = {
        ROOT / "README.md": figures(load_records()),
        ROOT / "docs" / "peers.md": peers_figures(load_records("peers")),
    }
    return {path: updated(path.read_text(), section) for path, section in sections.items()}


def main() -> int:
    """Rewrite the figures of README.md and docs/peers.md, docs/benchmarks.md's tables and the picture."""
    records = load_records()
    for path, text in pages().items():
        path.write_text(text)
    tables = [
        f"## {record['device']}\n\n" + "\n".join(comparison_table(entry) for entry in record["comparisons"])
        for record in records
    ]
    (ROOT / "docs" / "benchmarks.md").write_text(_PREFACE + "\n".join(tables))
    draw(records, ROOT / PICTURE)
    return 0


_PREFACE = """# Benchmarks

Made by `python -m bench.report` from `bench/results/`. Ratios, rates and fractions of the limit are of the device's
clock where it ran, else of the wall's. *Unavailable* is an SDPA backend that PyTorch refuses to run for the case,
with its reason. A target is *not measured* if a variant that it compares with has no figure.

"""


if __name__ == "__main__":
    sys.exit(main())
