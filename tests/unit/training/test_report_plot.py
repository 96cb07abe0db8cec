from __future__ import annotations

from pathlib import Path

import pytest

from server.training.columns import METHODS
from server.training.report import make_tables
from server.training.report_plot import plot_tables
from server.training.scores import Score


def _scores(methods: int, tasks: int, seeds: int, budgets: tuple[int, ...]) -> list[Score]:
    return [
        Score(f"task{t}_x", METHODS[m], s, examples, "rouge_l", 10.0 * m + t + s, 0.0, 10, 0.0, {}, "cpu")
        for examples in budgets
        for m in range(methods)
        for t in range(tasks)
        for s in range(seeds)
    ]


@pytest.mark.parametrize(
    ("methods", "tasks", "seeds", "budgets"), [(1, 1, 1, (8,)), (3, 2, 1, (0,)), (9, 8, 3, (8, 32))]
)
def test_any_number_of_methods_tasks_and_budgets_is_drawn(
    tmp_path: Path, methods: int, tasks: int, seeds: int, budgets: tuple[int, ...]
) -> None:
    plot_tables(make_tables(_scores(methods, tasks, seeds, budgets)), tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_drawn_as_far_as_it_goes(tmp_path: Path) -> None:
    plot_tables(make_tables(_scores(3, 4, 2, (8,))[:-5]), tmp_path / "scores.png")
    assert (tmp_path / "scores.png").exists()
