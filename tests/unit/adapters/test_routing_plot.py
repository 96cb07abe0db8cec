from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.adapters.routing import routing_weights
from server.adapters.routing_plot import choose_tasks, plot_routing
from server.adapters.routing_statistics import RoutingStatistics


def _statistics(tasks: int, heads: int = 4, skills: int = 3) -> RoutingStatistics:
    logits = torch.randn((tasks, 5, heads, skills), generator=torch.Generator().manual_seed(0))
    return RoutingStatistics(tuple(f"a_task_with_a_long_name_{i}" for i in range(tasks)), routing_weights(logits))


@pytest.mark.parametrize(("tasks", "heads", "skills"), [(1, 1, 1), (2, 1, 8), (12, 4, 3), (80, 8, 8)])
def test_any_number_of_tasks_heads_and_skills_is_drawn(tmp_path: Path, tasks: int, heads: int, skills: int) -> None:
    plot_routing(_statistics(tasks, heads, skills), tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_few_tasks_are_all_drawn_and_of_many_some_from_end_to_end() -> None:
    few, many = _statistics(5), _statistics(50)
    assert choose_tasks(few) == few.cluster_order
    chosen = choose_tasks(many)
    assert len(set(chosen)) == 12
    assert (chosen[0], chosen[-1]) == (many.cluster_order[0], many.cluster_order[-1])
