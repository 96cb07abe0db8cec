"""What an evaluation found, as a picture: each method's mean with its spread, and each method on each task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server.plotting import figure_file
from server.training.report import MethodRow, Table, short_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_NAN = float("nan")


def plot_tables(tables: Sequence[Table], path: Path) -> None:
    """Draw the tables to a file, one below the other. Raises InvalidInput as `server.plotting.figure_file` does."""
    heights = [1.6 + 0.34 * len(table.rows) for table in tables]
    most_tasks = max(len(table.tasks) for table in tables)
    with figure_file(path, width=7.0 + 0.75 * most_tasks, height=sum(heights)) as figure:
        parts = figure.subfigures(len(tables), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, table in zip(parts, tables, strict=True):
            _draw_table(part, table, most_tasks)


def _draw_table(figure: SubFigure, table: Table, most_tasks: int) -> None:
    figure.suptitle(f"{' and '.join(sorted(set(table.tasks.values())))} in percent after {table.examples} examples")
    bars, grid = figure.subplots(1, 2, width_ratios=[4.0, 0.75 * most_tasks + 1.0], sharey=True)
    _draw_means(bars, table.rows)
    _draw_tasks(grid, table)
    bars.set_yticks(range(len(table.rows)), [row.method for row in table.rows])
    bars.set_ylim(len(table.rows) - 0.5, -0.5)


def _draw_means(axes: Axes, rows: Sequence[MethodRow]) -> None:
    """A bar for each method's mean over tasks, with the standard deviation over seeds and the number."""
    spreads = [(place, row.overall) for place, row in enumerate(rows) if row.overall is not None]
    places = [place for place, _ in spreads]
    deviations = [spread.deviation or 0.0 for _, spread in spreads]
    axes.barh(places, [spread.mean for _, spread in spreads], xerr=deviations, height=0.7, capsize=3, color="C0")
    for (place, spread), deviation in zip(spreads, deviations, strict=True):
        axes.text(spread.mean + deviation + 1.5, place, str(spread), va="center", fontsize=8)
    ends = [spread.mean + deviation for (_, spread), deviation in zip(spreads, deviations, strict=True)]
    axes.set_xlim(0, max(ends, default=60.0) * 1.35 + 5)
    axes.set_xlabel("mean over tasks, ± standard deviation over seeds")
    axes.grid(visible=False, axis="y")


def _draw_tasks(axes: Axes, table: Table) -> None:
    """Each method's mean on each task, as a number on its colour."""
    names = short_names(list(table.tasks))
    values = [[_NAN if spread is None else spread.mean for spread in row.tasks.values()] for row in table.rows]
    axes.imshow(values, vmin=0, vmax=100, aspect="auto")
    for place, row in enumerate(values):
        for task, value in enumerate(row):
            if value == value:  # not a number where there is no score
                axes.text(
                    task, place, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black"
                )
    axes.set_xticks(range(len(names)), list(names.values()), rotation=30, ha="right")
    axes.grid(visible=False)
    axes.tick_params(axis="y", left=False)
