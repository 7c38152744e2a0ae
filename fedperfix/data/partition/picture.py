"""The picture of a partition: which client has how many samples of which class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedperfix.data.dataset import Dataset
from fedperfix.data.partition import Partition
from fedperfix.run.files import replacing
from fedperfix.run.plots import draw_bars

PICTURE = "partition.png"
_NAMED_CLASSES = 40  # with more, the names would be too small to read


def class_counts(dataset: Dataset, parts: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [clients, classes]: how many of each client's samples are of each class."""
    labels, classes = dataset.labels.numpy(), len(dataset.class_names)
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def draw_partition(path: Path, dataset: Dataset, partition: Partition) -> None:
    """Draw the table of classes by clients as a heat map, over the clients' sizes, as a PNG.

    Args:
        path: of the file; one that exists is replaced.
        dataset: what was divided.
        partition: how.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    class_names = dataset.class_names
    train, test = class_counts(dataset, partition.train), class_counts(dataset, partition.test)
    counts = (train + test).T
    classes, clients = counts.shape
    width, height = min(16.0, 5 + 0.13 * clients), min(11.0, 1.2 + max(1.6, 0.28 * min(classes, 26)))
    figure = Figure(figsize=(width, height + 1.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    table, sizes = figure.subplots(2, 1, sharex=True, height_ratios=(height, 1.6))
    figure.suptitle(f"{dataset.name}: {clients} clients, {classes} classes, {partition.rule}", fontsize=11)

    shown = np.ma.masked_equal(counts, 0)  # white is none at all, so that one sample can be seen
    edges = np.arange(clients + 1) - 0.5, np.arange(classes + 1) - 0.5
    line = 0.4 if clients * classes <= 2500 else 0
    mesh = table.pcolormesh(
        *edges, shown, cmap=_colours(), norm=PowerNorm(0.5, 0, max(1, counts.max())), edgecolors="white", lw=line
    )
    table.invert_yaxis()
    table.spines[:].set_color("#cbd5e0")
    table.tick_params(length=0)
    table.set_ylabel("class")
    if classes <= _NAMED_CLASSES:
        table.set_yticks(range(classes), [name if len(name) <= 24 else name[:23] + "…" for name in class_names])
        table.tick_params(axis="y", labelsize=9 if classes <= 26 else 7)
    else:
        table.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    figure.colorbar(mesh, ax=table, label="samples", pad=0.01, fraction=0.03)

    x = np.arange(clients)
    draw_bars(sizes, x, train.sum(1), color="#2b6cb0", label="training")
    draw_bars(sizes, x, test.sum(1), train.sum(1), color="#dd6b20", label="test")
    sizes.set_xlabel("client")
    sizes.set_ylabel("samples")
    sizes.spines[["top", "right"]].set_visible(False)
    sizes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    sizes.set_xlim(-0.5, clients - 0.5)
    sizes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _colours():
    """From light to dark blue; the lightest is still told from the white of an empty cell."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("samples", ["#d6e4f5", "#5b94cf", "#1a4f8b", "#0b2447"])
