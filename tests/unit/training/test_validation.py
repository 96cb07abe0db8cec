from __future__ import annotations

import pytest

from server.training.validation import Validation, chance


@pytest.mark.parametrize(
    ("one", "other", "better"),
    [
        (Validation(0.8, 2.0), Validation(0.7, 0.5), True),  # accuracy first
        (Validation(0.7, 0.4), Validation(0.7, 0.5), True),  # then loss
        (Validation(0.7, 0.5), Validation(0.7, 0.5), False),
        (Validation(0.6, 0.1), Validation(0.7, 0.5), False),
    ],
)
def test_accuracy_counts_before_loss(one: Validation, other: Validation, better: bool) -> None:
    assert one.better_than(other) is better


def test_each_example_counts_alike_in_a_mean() -> None:
    assert Validation.mean([Validation(1.0, 0.25), Validation(0.0, 1.25)]) == Validation(0.5, 0.75)


def test_chance_is_a_standard_error_and_never_nothing() -> None:
    assert chance(0.5, 16) == pytest.approx((0.25 / 16) ** 0.5)
    assert chance(1.0, 8) == chance(0.0, 8) == pytest.approx(0.05)
