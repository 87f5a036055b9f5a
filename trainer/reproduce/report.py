"""Tables of finished runs: Markdown to read, CSV to compute with, JSON with every run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.reproduce.paper import PRINTED, SOURCE, Figure
from trainer.reproduce.plan import Run
from trainer.reproduce.statistics import Comparison, Key, Summary, compare, summarise

X_NAMES = {"figure2": "samples", "figure3a": "source rows", "figure3b": "clusters"}


@dataclass(frozen=True)
class Done:
    """A finished run: its place in the table and its accuracy in per cent."""

    run: Run
    accuracy: float
    record: dict[str, Any]


def label_of(run: Run, modes: Sequence[str]) -> str:
    """A row's name; the attention mode is part of it where there are several."""
    return f"{run.row} [{run.mode}]" if run.mode and len(modes) > 1 else run.row


@dataclass(frozen=True)
class Grid:
    """Finished runs in rows and columns.

    Attributes:
        what: table1, figure2 ...; rows, columns: names in order (columns are tasks, or x values
            of a figure); cells: (row, column) -> summary; values: row -> (task, x, seed) ->
            accuracy; planned: runs of each cell in all.
    """

    what: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Summary]
    values: dict[str, dict[Key, float]]
    planned: dict[tuple[str, str], int]

    def mean(self, row: str) -> Summary | None:
        """Mean over the columns, once all have a figure; its deviation is the mean of theirs."""
        found = [self.cells.get((row, column)) for column in self.columns]
        cells = [cell for cell in found if cell is not None]
        if len(cells) < len(found) or not cells:
            return None
        deviations = [cell.deviation for cell in cells]
        known = [d for d in deviations if d is not None]
        deviation = sum(known) / len(known) if len(known) == len(deviations) else None
        mean = sum(cell.mean for cell in cells) / len(cells)
        return Summary(mean, deviation, min(cell.count for cell in cells))


def make_grid(what: str, plan: Sequence[Run], done: Sequence[Done], modes: Sequence[str]) -> Grid:
    """Arrange finished runs."""
    several = len({run.task for run in plan}) > 1

    def column_of(run: Run) -> str:
        if what not in X_NAMES:
            return run.task
        return f"{run.task} {run.x}" if several else str(run.x)

    rows = list(dict.fromkeys(label_of(run, modes) for run in plan))
    columns = list(dict.fromkeys(column_of(run) for run in plan))
    planned: dict[tuple[str, str], int] = {}
    for run in plan:
        key = (label_of(run, modes), column_of(run))
        planned[key] = planned.get(key, 0) + 1
    values: dict[str, dict[Key, float]] = {row: {} for row in rows}
    found: dict[tuple[str, str], dict[int, float]] = {}
    for item in done:
        run, row = item.run, label_of(item.run, modes)
        values[row][run.task, run.x, run.seed] = item.accuracy
        found.setdefault((row, column_of(run)), {})[run.seed] = item.accuracy
    cells = {place: summarise(list(by_seed.values())) for place, by_seed in found.items()}
    return Grid(what, rows, columns, cells, values, planned)


def comparisons(grid: Grid) -> list[Comparison]:
    """Each MetaPT row against every other row, and `prefix` against `full` of the same row."""
    modes = [
        (row, full)
        for row in grid.rows
        if (full := row.replace("[prefix]", "[full]")) != row and full in grid.rows
    ]
    pairs: list[tuple[str, str]] = []
    for first in grid.rows:
        if first.startswith("MetaPT"):
            known = {frozenset(pair) for pair in (*pairs, *modes)}
            others = [row for row in grid.rows if row != first]
            pairs += [(first, row) for row in others if frozenset((first, row)) not in known]
    found = [compare(a, b, grid.values[a], grid.values[b]) for a, b in (*pairs, *modes)]
    return [comparison for comparison in found if comparison is not None]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell_text(grid: Grid, row: str, column: str) -> str:
    cell = grid.cells.get((row, column))
    planned = grid.planned.get((row, column), 0)
    if cell is None:
        return f"(0 of {planned})" if planned else ""
    return f"{cell}" if cell.count == planned else f"{cell} ({cell.count} of {planned})"


def _printed(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{figure[0]:.2f}" if figure[1] is None else f"{figure[0]:.2f} ± {figure[1]:.2f}"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def markdown(grid: Grid, title: str, notes: Sequence[str]) -> str:
    """The table, the paper's figures beside it, and the comparisons."""
    corner = X_NAMES.get(grid.what, "")
    rows = [
        [
            row,
            *(_cell_text(grid, row, column) for column in grid.columns),
            str(grid.mean(row) or ""),
        ]
        for row in grid.rows
    ]
    parts = [
        f"# {title}\n",
        "Accuracy in per cent: mean ± sample deviation over the seeds; under `mean` the mean of "
        "the row's means ± the mean of its deviations. `(n of m)` marks what is not finished.\n",
        *(f"- {note}" for note in notes),
        "",
        _table([corner, *grid.columns, "mean"], rows),
    ]
    printed = PRINTED.get(grid.what)
    if printed:
        shown = [
            [row, *(_printed(figures.get(column)) for column in grid.columns)]
            for row, figures in printed.items()
        ]
        shown = [row for row in shown if any(row[1:])]
        if shown:
            parts.append(
                f"As printed in the paper, as far as legible (T5-base unless named; {SOURCE}):\n"
            )
            parts.append(_table(["", *grid.columns], shown))
    found = comparisons(grid)
    if found:
        parts.append(
            "Paired over tasks and seeds, and over the points of a figure: mean difference in "
            "percentage points with its 95 % bootstrap interval, two-sided p of the paired t-test "
            "and of Wilcoxon's signed ranks, and of the t-test over the tasks' means alone, "
            "whose pairs are independent.\n"
        )
        parts.append(
            _table(
                ["row", "against", "pairs", "difference", "95 %", "t", "Wilcoxon", "t over tasks"],
                [
                    [
                        c.first, c.second, str(c.pairs), f"{c.difference:+.2f}",
                        f"{c.low:+.2f} … {c.high:+.2f}", _p(c.t_p), _p(c.wilcoxon_p), _p(c.task_p),
                    ]
                    for c in found
                ],
            )
        )  # fmt: skip
    return "\n".join(parts)


def as_csv(done: Sequence[Done]) -> str:
    """One line a run: row, mode, task, x, seed, accuracy and what else it measured."""
    names = [
        "macro_f1", "calibration_error", "validation_accuracy", "start_accuracy", "steps", "rows",
        "seconds",
    ]  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "mode", "task", "x", "seed", "accuracy", *names])
    for item in done:
        run, result = item.run, item.record["result"]
        writer.writerow(
            [run.row, run.mode, run.task, run.x, run.seed, f"{item.accuracy:.4f}"]
            + [result.get(name, "") for name in names]
        )
    return out.getvalue()
