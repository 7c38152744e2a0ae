"""The picture of a run: accuracy over rounds, and how it is spread over clients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedperfix.run.files import replacing
from fedperfix.run.metrics import HEADLINES, RoundMetrics

PLOT = "accuracy.png"
_BARS = 500  # at most so many are drawn one by one
_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#718096"


def plot_run(path: Path, rounds: Sequence[RoundMetrics], accuracies: Sequence[float], title: str) -> None:
    """Draw the run as a PNG of 1500 x 600 pixels.

    Args:
        path: of the file.
        rounds: the run's metrics, in order.
        accuracies: percent per client, of the last evaluation over all clients.
        title: what the run was.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    curve, spread = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title, fontsize=11)
    _draw_curve(curve, rounds)
    _draw_spread(spread, sorted(accuracies))
    for axes in (curve, spread):
        axes.set_ylim(0, 100)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
        axes.set_axisbelow(True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_bars(axes: Any, x: Sequence[int], heights: Sequence[float], bottom: Any = 0.0, **style: Any) -> None:
    """One bar per client; of very many clients, which would take minutes, the outline of the bars.

    Args:
        axes: matplotlib's, to draw on.
        x, heights: where the bars stand and how high they are.
        bottom: where they begin, a number or one for each.
        style: of matplotlib, such as a colour.
    """
    if len(x) <= _BARS:
        axes.bar(x, heights, bottom=bottom, width=0.8, **style)
    else:
        axes.fill_between(x, bottom, bottom + np.asarray(heights), step="mid", lw=0, **style)


def _draw_curve(axes, rounds: Sequence[RoundMetrics]) -> None:
    tested = [metrics for metrics in rounds if metrics.headline]
    x = [metrics.round for metrics in tested]
    mean = [metrics.headline_mean or 0.0 for metrics in tested]
    std = [getattr(metrics, f"{metrics.headline}_std") for metrics in tested]
    low = [max(0.0, middle - spread) for middle, spread in zip(mean, std, strict=True)]
    high = [min(100.0, middle + spread) for middle, spread in zip(mean, std, strict=True)]
    label = "after local training, sampled clients"
    axes.plot(
        [m.round for m in rounds], [m.local_mean for m in rounds], color=_ORANGE, lw=1.2, alpha=0.8, label=label
    )
    axes.fill_between(x, low, high, color=_BLUE, alpha=0.15, lw=0)
    tested_as = f"{HEADLINES[tested[-1].headline or 'all']}, {tested[-1].headline_of} clients (mean ± std)"
    axes.plot(x, mean, color=_BLUE, lw=2, marker="o", ms=4, label=tested_as)
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("test accuracy (%)")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_spread(axes, accuracies: Sequence[float]) -> None:
    mean = sum(accuracies) / len(accuracies)
    draw_bars(axes, range(1, len(accuracies) + 1), accuracies, color=_BLUE, alpha=0.75)
    axes.axhline(mean, color=_GREY, lw=1, ls="--")
    axes.annotate(f"mean {mean:.1f}", (0.02, mean), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes.set_xlabel("clients, from worst to best")
