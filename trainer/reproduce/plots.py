"""Plots with error bars, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import UserError, install
from serve.files import atomic_write
from trainer.reproduce.report import X_NAMES, Done, Grid, label_of
from trainer.reproduce.statistics import summarise

TSNE_TEXTS = 2000  # of figure 4: more points only cover one another


def pyplot() -> Any:
    """matplotlib without a screen.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"plots need matplotlib: {install('reproduce')}") from None
    matplotlib.use("Agg")
    # SVG ids are drawn at random and the date is written, unless told otherwise: equal runs shall
    # give equal files.
    matplotlib.rcParams["svg.hashsalt"] = "metapt"
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg, each whole or not at all."""
    paths = []
    for kind in ("png", "svg"):
        path = stem.with_suffix(f".{kind}")
        with atomic_write(path) as temporary:
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(temporary, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
        paths.append(path)
    pyplot().close(figure)
    return paths


def plot_bars(grid: Grid, title: str, stem: Path) -> list[Path]:
    """A group of bars a task, one bar a row, deviations as error bars."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(max(6, 1.6 * len(grid.columns) + 2), 4))
    width = 0.8 / max(1, len(grid.rows))
    for index, row in enumerate(grid.rows):
        cells = [grid.cells.get((row, column)) for column in grid.columns]
        places = np.arange(len(cells)) + (index - (len(grid.rows) - 1) / 2) * width
        there = [i for i, cell in enumerate(cells) if cell is not None]
        kept = [cell for cell in cells if cell is not None]
        axes.bar(
            places[there], [cell.mean for cell in kept], width, label=row,
            yerr=[cell.deviation or 0.0 for cell in kept], capsize=2, error_kw={"linewidth": 0.8},
        )  # fmt: skip
    axes.set_xticks(range(len(grid.columns)), grid.columns)
    axes.set_ylabel("accuracy, %")
    axes.set_title(title)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, stem)


def plot_lines(
    what: str, done: Sequence[Done], modes: Sequence[str], title: str, stem: Path
) -> list[Path]:
    """A panel a task, a line a row, deviations as error bars; sizes on a logarithmic axis."""
    plt = pyplot()
    tasks = list(dict.fromkeys(item.run.task for item in done)) or [""]
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(5 * len(tasks) + 1, 4), squeeze=False, sharey=False
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        lines: dict[str, dict[int, list[float]]] = {}
        for item in done:
            if item.run.task == task:
                points = lines.setdefault(label_of(item.run, modes), {})
                points.setdefault(item.run.x, []).append(item.accuracy)
        for row, points in lines.items():
            xs = sorted(points)
            cells = [summarise(points[x]) for x in xs]
            axes.errorbar(
                xs, [cell.mean for cell in cells], [cell.deviation or 0.0 for cell in cells],
                marker="o", markersize=4, capsize=3, label=row,
            )  # fmt: skip
        if what != "figure3b" and lines:
            axes.set_xscale("log")
        sizes = sorted({x for points in lines.values() for x in points})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel(X_NAMES[what])
        axes.set_ylabel("accuracy, %")
        axes.set_title(task)
        if lines:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    return save(figure, stem)


def tsne(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """[N, D] -> [N, 2] (van der Maaten and Hinton 2008)."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(2.0, (len(vectors) - 1) / 3))
    model = TSNE(2, random_state=seed, init="pca", perplexity=perplexity)
    return model.fit_transform(vectors)


def plot_clusters(
    points: np.ndarray, clusters: dict[int, np.ndarray], title: str, stem: Path
) -> list[Path]:
    """A panel a number of clusters: the same points [N, 2], coloured by cluster [N]."""
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(clusters), figsize=(4.5 * len(clusters), 4.2), squeeze=False
    )
    for axes, (count, labels) in zip(panels[0], clusters.items(), strict=True):
        axes.scatter(points[:, 0], points[:, 1], c=labels, cmap="tab20", s=4, linewidths=0)
        axes.set_title(f"k = {count}")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(title)
    return save(figure, stem)
