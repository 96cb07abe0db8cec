from __future__ import annotations

import pytest

from server.training.lead import Lead
from server.training.scores import Score


def _scores(method: str, values: dict[tuple[str, int], float]) -> list[Score]:
    return [
        Score(task, method, seed, 8, "rouge_l", value, 0.0, 10, 0.0, {}, "cpu")
        for (task, seed), value in values.items()
    ]


def test_the_lead_is_the_mean_of_the_differences_and_not_of_what_draws_have_in_common() -> None:
    hard_and_easy = {("a", 0): 10.0, ("a", 1): 90.0, ("b", 0): 30.0, ("b", 1): 60.0}
    ahead = {("a", 0): 12.0, ("a", 1): 94.0, ("b", 0): 28.0, ("b", 1): 60.0}
    lead = Lead.of(_scores("mhr", ahead), _scores("lora", hard_and_easy))
    assert lead is not None
    # Differences 2, 4, -2, 0: mean 1, sample variance 20 / 3, of the mean a quarter of it.
    assert lead == Lead(1.0, pytest.approx((20 / 3 / 4) ** 0.5), pairs=4, tasks_ahead=1, tasks=2)
    assert str(lead) == "+1.0 ± 1.3 (1 of 2)"


def test_only_draws_that_both_have_count() -> None:
    mine = _scores("mhr", {("a", 0): 50.0, ("a", 1): 99.0})
    theirs = _scores("lora", {("a", 0): 60.0, ("b", 0): 0.0})
    assert Lead.of(mine, theirs) == Lead(-10.0, None, pairs=1, tasks_ahead=0, tasks=1)
    assert str(Lead.of(mine, theirs)) == "-10.0 (0 of 1)"


def test_without_a_draw_in_common_there_is_no_lead() -> None:
    assert Lead.of(_scores("mhr", {("a", 0): 50.0}), _scores("lora", {("b", 0): 50.0})) is None
    assert Lead.of(_scores("mhr", {("a", 0): 50.0}), []) is None
