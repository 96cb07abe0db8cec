from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import InvalidInput
from server.training.pretrain_config import Layout, PretrainConfig, PretrainMethod, choose_layout
from server.training.sampling import SamplingConfig
from server.training.trainer import TrainerConfig

MHR, POLY, SHARED, PRIVATE = PretrainMethod


@pytest.mark.parametrize(
    ("asked", "layout"),
    [
        ((), Layout(MHR, 8, 8, 8.0)),
        ((None, 1), Layout(POLY, 1, 8, 8.0)),
        ((None, 4, 3), Layout(MHR, 4, 3, 8.0)),
        ((MHR,), Layout(MHR, 8, 8, 8.0)),
        ((POLY,), Layout(POLY, 1, 8, 8.0)),
        ((POLY, 1, 5), Layout(POLY, 1, 5, 8.0)),
        ((POLY, 1, 5, 1.0), Layout(POLY, 1, 5, 1.0)),
        ((SHARED,), Layout(SHARED, 1, 1, None)),
        ((SHARED, 1, 1), Layout(SHARED, 1, 1, None)),
        ((PRIVATE,), Layout(PRIVATE, 1, None, None)),
    ],
)
def test_what_is_left_out_takes_the_methods_own_value(asked: tuple[object, ...], layout: Layout) -> None:
    assert choose_layout(*asked) == layout


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ((MHR, 1), "mhr needs more than one head; use poly"),
        ((POLY, 8), "poly has one head, not 8"),
        ((SHARED, 2), "shared has one head, not 2"),
        ((SHARED, 1, 4), "shared has one skill, not 4; give it a larger rank"),
        ((PRIVATE, 2), "private has one head, not 2"),
        ((PRIVATE, 1, 4), "private has one skill for every task"),
        ((SHARED, 1, 1, 2.0), "shared learns no routing; leave spread out"),
        ((PRIVATE, None, None, 2.0), "private learns no routing; leave spread out"),
        ((MHR, 8, 8, 0.5), "spread must be a number of at least 1"),
        ((MHR, 8, 8, float("nan")), "spread must be a number of at least 1"),
        ((None, 0), "heads must be at least 1"),
        ((None, None, 0), "skills must be at least 1"),
    ],
)
def test_sizes_that_contradict_the_method_are_refused(asked: tuple[object, ...], complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        choose_layout(*asked)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"trainer": TrainerConfig(steps=0)}, "steps must be at least 1"),
        ({"sampling": SamplingConfig(rows_per_task=3)}, "16 sequences cannot be made of 3 rows a task"),
        ({"alignment_every": -1}, "alignment_every must be at least 0"),
        ({"alignment_tasks": 1}, "alignment_tasks must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        PretrainConfig(Path("data"), Path("out"), **changes)
