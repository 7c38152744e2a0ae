"""The picture of the records: which fraction of the device's own limit is reached, over tokens and over clients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.entries import Entry, is_sound, ours

_PANELS = ("forward", "backward", "forward + backward", "aggregation")
_BLUE, _ORANGE = "#2b6cb0", "#dd6b20"


@dataclass(frozen=True, order=True)
class Point:
    """One variant of one comparison.

    Args:
        panel: `forward`, `backward`, `forward + backward` (attention), or `aggregation`.
        line: which points belong together, for people.
        own: whether it is ours; else the baseline.
        x: tokens N of attention, clients K of aggregation.
        fraction: of the limit, from 0 to 1.
    """

    panel: str
    line: str
    own: bool
    x: int
    fraction: float


def points(record: dict[str, Any]) -> list[Point]:
    """Ours and the baseline of every gated attention and every aggregation of a record, sorted by line and x."""
    return sorted(point for entry in record["comparisons"] for point in _points(entry))


def _points(entry: Entry) -> Iterable[Point]:
    settings = entry["settings"]
    if settings.get("mode") == "gated" and settings.get("kind") in _PANELS:
        prefix = "adapter" if settings["prefix_len"] is None else f"{settings['prefix_len']} shared tokens"
        panel, x, what = settings["kind"], settings["tokens"], f"{_short(settings['dtype'])}, {prefix}"
    elif entry["name"].startswith("aggregation") and "clients" in settings:
        panel, x, what = "aggregation", settings["clients"], entry["name"].split(", K=")[0].partition(" ")[2]
    else:
        return
    for name in (next(iter(entry["variants"])), ours(entry)):
        variant = entry["variants"][name]
        if is_sound(variant) and "fraction_of_limit" in variant:
            yield Point(panel, f"{name}: {what}", name == ours(entry), x, variant["fraction_of_limit"])


def _short(dtype: str) -> str:
    return dtype.removeprefix("torch.")


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw a row of panels per record as a PNG.

    Args:
        records: as `bench.record` writes them, one per device.
        path: of the file; its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 5.2 * max(1, len(records))), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(max(1, len(records)), 1, squeeze=False)[:, 0]
    for row, record in zip(rows, records, strict=False):
        row.suptitle(record["device"], fontsize=12)
        found = points(record)
        for axes, panel in zip(row.subplots(1, len(_PANELS)), _PANELS, strict=True):
            _draw_panel(axes, panel, [point for point in found if point.panel == panel])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw_panel(axes: Any, panel: str, found: list[Point]) -> None:
    styles = iter(("-", "--", ":", "-.") * len(found))
    marks = iter("os^vD*" * len(found))
    kinds = {line.partition(": ")[2]: None for line in sorted({point.line for point in found})}
    look = {kind: (next(styles), next(marks)) for kind in kinds}
    for line in dict.fromkeys(point.line for point in found):
        chosen = [point for point in found if point.line == line]
        style, mark = look[line.partition(": ")[2]]
        colour = _BLUE if chosen[0].own else _ORANGE
        axes.plot(
            [p.x for p in chosen], [100 * p.fraction for p in chosen], style, marker=mark, color=colour, label=line
        )
    ticks = sorted({point.x for point in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_title(panel if panel == "aggregation" else f"attention, {panel}", fontsize=10)
    axes.set_xlabel("clients K" if panel == "aggregation" else "tokens N")
    axes.set_ylabel("% of the limit")
    axes.set_ylim(0, max([100.0, *(105 * point.fraction for point in found)]))  # more only where a cache helps
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    if found:
        columns = 1 if len(axes.lines) <= 8 else 2
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns)
