"""The routings of an inventory's tasks as a picture: heads and skills, the tasks' similarity, each skill's use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from server.adapters.routing_statistics import RoutingStatistics
from server.plotting import figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_MAX_PANELS = 12  # tasks drawn one by one
_PANELS_IN_ROW = 3
_MAX_NAMED = 60  # tasks whose names still can be read beside the similarities
_NAME_LENGTH = 34


def plot_routing(statistics: RoutingStatistics, path: Path) -> None:
    """Draw the statistics to a file. Raises InvalidInput as `server.plotting.figure_file` does."""
    shown = choose_tasks(statistics)
    height = max(7.0, 0.16 * min(len(statistics.tasks), _MAX_NAMED) + 2.5)
    with figure_file(path, width=16.0, height=height) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[1.0, 1.25], squeeze=False)[0]
        upper, lower = left.subfigures(2, 1, height_ratios=[3.0, 1.0], squeeze=False)[:, 0]
        _draw_heads(upper, statistics, shown)
        _draw_use(lower.subplots(), statistics)
        _draw_similarities(right, statistics)


def choose_tasks(statistics: RoutingStatistics) -> list[int]:
    """The tasks to draw one by one: all where they are few, else some spread evenly over the clustering's order."""
    order = statistics.cluster_order
    if len(order) <= _MAX_PANELS:
        return order
    places = torch.linspace(0, len(order) - 1, _MAX_PANELS).round().int().tolist()
    return [order[place] for place in places]


def _draw_heads(figure: SubFigure, statistics: RoutingStatistics, shown: list[int]) -> None:
    """One picture (h, K) for each of the tasks shown, all in the same colours."""
    weights = statistics.head_weights[shown]
    even = 1 / statistics.num_skills
    reach = max(float((weights - even).abs().max()), 1e-6)
    rows = -(-len(shown) // _PANELS_IN_ROW)
    grid = figure.subplots(rows, _PANELS_IN_ROW, squeeze=False, sharex=True, sharey=True).flatten()
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes, task, picture in zip(grid, shown, weights, strict=False):
        image = axes.imshow(picture.numpy(), vmin=even - reach, vmax=even + reach, cmap="RdBu_r", aspect="auto")
        axes.set_title(_short(statistics.tasks[task], 28), fontsize=7)
        axes.grid(visible=False)
        axes.locator_params(integer=True)
        axes.tick_params(labelsize=7)
    for axes in grid[: len(shown) : _PANELS_IN_ROW]:
        axes.set_ylabel("head")
    for axes in grid[max(0, len(shown) - _PANELS_IN_ROW) : len(shown)]:
        axes.set_xlabel("skill")
    count = len(statistics.tasks)
    of = f"{len(shown)} of {count} tasks" if len(shown) < count else f"{count} tasks"
    figure.suptitle(f"Routing weights of {of}, averaged over {statistics.weights.shape[1]} linears")
    figure.colorbar(image, ax=list(grid), label=f"weight; white is 1/K = {even:.3f}")


def _draw_use(axes: Axes, statistics: RoutingStatistics) -> None:
    """Each skill's mean weight, with the spread of single linears' heads."""
    use = statistics.skill_use.flatten(0, 1)  # (L * h, K)
    skills = range(statistics.num_skills)
    spread = use.std(0) if len(use) > 1 else torch.zeros(statistics.num_skills)
    axes.errorbar(skills, use.mean(0).numpy(), yerr=spread.numpy(), fmt="o", capsize=4)
    axes.axhline(1 / statistics.num_skills, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(list(skills))
    axes.set_xlabel("skill")
    axes.set_ylabel("weight (dashed: 1/K)")
    axes.set_title("Use of each skill over all tasks: mean and standard deviation over linears and heads", fontsize=9)


def _draw_similarities(figure: SubFigure, statistics: RoutingStatistics) -> None:
    """The tasks' cosines in the clustering's order, and the entropy of each beside them."""
    order = statistics.cluster_order
    count = len(order)
    own = torch.eye(count, dtype=torch.bool)
    similarities = statistics.similarities[order][:, order].masked_fill(own, float("nan"))
    reach = max(float(similarities[~own].abs().max()), 1e-6) if count > 1 else 1.0
    matrix, bars = figure.subplots(1, 2, width_ratios=[6.0, 1.0], sharey=True)
    image = matrix.imshow(similarities.numpy(), vmin=-reach, vmax=reach, cmap="RdBu_r", aspect="auto")
    matrix.set_facecolor("lightgrey")
    matrix.grid(visible=False)
    matrix.set_title("Similarity of the tasks' routings", fontsize=9)
    matrix.set_xticks([])
    if count <= _MAX_NAMED:
        matrix.set_yticks(range(count), [_short(statistics.tasks[task], _NAME_LENGTH) for task in order], fontsize=7)
    figure.colorbar(image, ax=matrix, location="bottom", shrink=0.6, pad=0.01, label="cosine of w - 1/K")
    bars.barh(range(count), statistics.entropy_fractions[order].numpy(), height=0.8)
    bars.set_xlim(0, 1)
    bars.set_xlabel("entropy / ln K")
    bars.set_title(f"mean {float(statistics.entropies.mean()):.2f} nats", fontsize=9)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
